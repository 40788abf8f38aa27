"""Which tests concern which sources, and which mutants change nothing: concerns.yaml and equivalents.yaml."""

import fnmatch
import re
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

Equivalents = dict[tuple[str, str, str], str]  # (file, line before, line after), both bare, -> why it is equivalent


class Concern(NamedTuple):
    name: str
    sources: list[str]
    tests: list[list[str]]  # arguments of pytest, one list a run, the quickest first


def read_concerns(only: list[str]) -> list[Concern]:
    """The concerns of the table with those of their sources that fit one of the patterns, or whose concern does."""
    content = yaml.safe_load((HERE / "concerns.yaml").read_text(encoding="utf-8"))
    concerns = []
    for name, parts in content.items():
        sources = [str(p.relative_to(ROOT)) for pattern in parts["sources"] for p in sorted(ROOT.glob(pattern))]
        chosen = [s for s in sources if any(fnmatch.fnmatch(s, p) or fnmatch.fnmatch(name, p) for p in only)]
        if chosen:
            concerns.append(Concern(name, chosen, [_words(line) for line in parts["tests"]]))
    return concerns


def _words(line: str) -> list[str]:
    """`tests/test_x.py -k a or b` -> its arguments."""
    files, _, chosen = line.partition(" -k ")
    return [*files.split(), *(["-k", chosen] if chosen else [])]


def read_equivalents() -> Equivalents:
    """Mutants that do not change behaviour."""
    content = yaml.safe_load((HERE / "equivalents.yaml").read_text(encoding="utf-8")) or []
    return {(row["file"], bare(row["before"]), bare(row["after"])): row["why"] for row in content}


def bare(line: str) -> str:
    """The line without white space, which operators change at will."""
    return re.sub(r"\s+", "", line)
