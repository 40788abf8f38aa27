"""The README tells the truth: its Python runs, its commands exist, its files are there."""

import re
import shlex
from pathlib import Path

import pytest

from pipelines import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [content for tag, content in found if tag == language]


def commands() -> list[list[str]]:
    """The words of every `tessera` line in the shell blocks."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("tessera ")]


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, with the bundle that ships in the package; where it is missing, this fails."""
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python")[number], f"README.md, Python block {number + 1}", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_and_their_options_exist(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = [word.split("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)]
    plain = [word for word in words[1:] if re.fullmatch(r"[a-z-]+", word) and not word.startswith("-")]
    for depth in (2, 1):  # `train` is a command with arguments, `evaluate tokenizer` a command of a group
        code = cli.main([*plain[:depth], "--help"])
        shown = capsys.readouterr().out
        if code == 0:
            break
    assert code == 0, f"{' '.join(words)} is no command"
    assert not [option for option in options if option not in shown]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_recipes_that_commands_name_are_there(words: list[str]) -> None:
    assert not [word for word in words if word.startswith("recipes/") and not (ROOT / word).exists()]


def test_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    asked = {line.split()[1] for block in blocks("bash") for line in block.splitlines() if line.startswith("make ")}
    assert asked and not [target for target in asked if not re.search(rf"^{target}:", makefile, re.MULTILINE)]


def test_pictures_and_pages_that_it_links_are_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README)
    local = [one or other for one, other in links if not (one or other).startswith("http")]
    assert local, "the README shows no picture"
    assert not [link for link in local if not (ROOT / link).exists()]


def test_files_of_the_map_are_there() -> None:
    """Each line of the tree is a folder and what is in it; words with a dot or a slash at the end are files there."""
    (tree,) = [block for block in blocks("") if block.startswith("tessera/")]
    for line in tree.splitlines():
        folder, *described = line.split()
        names = [name for word in described for name in re.findall(r"^([\w.]+(?:\.(?:py|sh|yaml)|/)),?$", word)]
        assert not [name for name in ["", *names] if not (ROOT / folder / name).exists()], line


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.findall(r"@@\w+@@|TODO|XXX", README)
