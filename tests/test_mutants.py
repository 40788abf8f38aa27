"""The tables of `make mutants` are about files and lines that are there; docs/testing.md says what it does."""

import pytest

from tests.mutants.tables import ROOT, bare, read_concerns, read_equivalents


def test_every_file_of_the_table_is_there():
    concerns = read_concerns(["*"])
    assert len(concerns) > 10
    for concern in concerns:
        files = [word for line in concern.tests for word in line if word.startswith("tests/")]
        assert files and all((ROOT / file).is_file() for file in files), concern.name
        assert not any(" " in file or file.endswith(",") for file in files)


def test_a_concern_or_files_are_chosen():
    assert [concern.name for concern in read_concerns(["losses"])] == ["losses"]
    (chosen,) = read_concerns(["stage2_prior/sampling/settings.py"])
    assert (chosen.name, chosen.sources) == ("sampling", ["stage2_prior/sampling/settings.py"])


def test_lines_that_are_called_equivalent_are_still_there():
    for (file, before, after), why in read_equivalents().items():
        assert before in bare((ROOT / file).read_text(encoding="utf-8")), f"{file} has no {before} now; drop the entry"
        assert before != after and len(why) > 10


def test_mutants_of_a_line():
    """The operators, where they are installed, and what they leave alone."""
    pytest.importorskip("cosmic_ray")
    from tests.mutants.mutations import mutate, places

    source = """def f(x: int | None = 2) -> float:
    \"\"\"Of 3 - 1.\"\"\"
    if x is None:
        raise ValueError(f"{1 - 1} is not 4")
    return min(x, 0.5) * x.shape[-1]
"""
    found = {mutant.after for place in places("f.py", source) if (mutant := mutate(place, source))}
    assert {"return max(x, 0.5) * x.shape[-1]", "return min(x, 0.5) / x.shape[-1]"} <= found
    assert {"return min(x, 0.525) * x.shape[-1]", "if x is not None:"} <= found
    assert any("= 3)" in bare(line).replace("=3)", "= 3)") for line in found)
    assert not any("raise" in line or "Of 3" in line or "[+1]" in line for line in found)
