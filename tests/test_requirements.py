"""The lower bounds that pip is told are the releases that `make test-oldest` runs on."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
OLDEST = ROOT / "tests" / "oldest.txt"


def requirements() -> list[Requirement]:
    """Everything in pyproject.toml but for Tessera's own extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [one for one in map(Requirement, lines) if one.name != project["name"]]


def oldest() -> dict[str, str]:
    pins: dict[str, str] = {}
    for line in OLDEST.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            (name, version) = line.split("==")
            assert str(canonicalize_name(name)) not in pins, f"{name} is there twice"
            pins[str(canonicalize_name(name))] = version
    return pins


def test_every_requirement_is_there_once_and_only_they():
    names = [canonicalize_name(one.name) for one in requirements()]
    assert sorted(names) == sorted(oldest())


@pytest.mark.parametrize("requirement", requirements(), ids=lambda one: one.name)
def test_the_lower_bound_is_the_oldest_release_that_is_tested(requirement: Requirement):
    bounds = [Version(one.version) for one in requirement.specifier if one.operator == ">="]
    assert bounds == [Version(oldest()[canonicalize_name(requirement.name)])]


def test_the_makefile_installs_them_beside_the_usual_environment():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rules = dict(re.findall(r"^(\S*OLDEST\S*|test-oldest): .*\n((?:\t.*\n)+)", makefile, re.MULTILINE))
    assert "--constraint tests/oldest.txt" in rules["$(OLDEST)/.oldest"]
    assert not any("$(VENV)" in rule for rule in rules.values())
