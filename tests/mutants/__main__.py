"""Plants small faults and counts how many the tests notice: `make mutants`, or `python -m tests.mutants --help`.

The working tree is copied, each mutant is written into the copy, and pytest runs the tests of the file's concern there
(concerns.yaml) until one fails. Every run is forked from a process that has imported torch and the other libraries, so
it starts at once. A mutant that no test notices survives; equivalents.yaml lists those that do not change behaviour,
each with the reason, and they are not drawn. docs/testing.md has the score.
"""

import argparse
import fnmatch
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.mutants.mutations import Mutant, Place, mutate, places

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
LIBRARIES = """pytest hypothesis numpy PIL.Image yaml pydantic typer tqdm einops safetensors.torch torch
    torch.utils.tensorboard torchvision transformers tokenizers open_clip accelerate ftfy huggingface_hub
    peft torchmetrics""".split()


class Concern(NamedTuple):
    name: str
    sources: list[str]
    tests: list[list[str]]  # arguments of pytest, one list a run, the quickest first


class Result(NamedTuple):
    concern: str
    mutant: Mutant
    outcome: str  # killed, survived, timed out
    seconds: float


def main() -> int:
    arguments = _arguments()
    concerns = read_concerns(arguments.only)
    equivalents = read_equivalents()
    _preload()
    with tempfile.TemporaryDirectory(prefix="tessera-mutants-") as scratch:
        slots = [_copy(Path(scratch) / str(number)) for number in range(arguments.jobs)]
        limits = {} if arguments.list else {c.name: _time_limit(c, slots[0]) for c in concerns}
        drawn = draw(concerns, arguments.seed, equivalents)
        if arguments.list:
            for number, (concern, mutant) in zip(range(arguments.count), drawn, strict=False):
                print(f"{number} {concern.name} {_describe(mutant)}")
            return 0
        end = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
        results = list(run(drawn, arguments.count, slots, limits, end))
    if arguments.json:
        rows = [
            {**r.mutant.place._asdict(), "before": r.mutant.before, "after": r.mutant.after, "outcome": r.outcome}
            | {"concern": r.concern, "seconds": round(r.seconds, 1)}
            for r in results
        ]
        arguments.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(results, arguments.seed))
    caught = sum(r.outcome != "survived" for r in results)
    return 0 if caught >= 0.95 * len(results) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="mutants, the same number of each concern")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--minutes", type=float, help="start no further mutant after this long")
    parser.add_argument("--only", nargs="+", default=["*"], help="concerns or files: losses 'stage2_prior/sampling/*'")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--json", type=Path, help="file for the outcome of each")
    parser.add_argument("--list", action="store_true", help="show the sample and run nothing")
    return parser.parse_args()


# The sample -----------------------------------------------------------------------------------------------------------


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


def read_equivalents() -> set[tuple[str, str, str]]:
    """Mutants that do not change behaviour, as (file, line before, line after) without white space."""
    content = yaml.safe_load((HERE / "equivalents.yaml").read_text(encoding="utf-8")) or []
    return {(row["file"], _bare(row["before"]), _bare(row["after"])) for row in content}


def _bare(line: str) -> str:
    return re.sub(r"\s+", "", line)


def draw(
    concerns: list[Concern], seed: int, equivalents: set[tuple[str, str, str]]
) -> Iterator[tuple[Concern, Mutant]]:
    """Mutants in random order, the concerns in turn, one of each line before a second of any."""
    queues = [_drawn_of(c, random.Random(f"{seed} {c.name}"), equivalents) for c in concerns]
    while queues:
        for queue in list(queues):
            try:
                yield next(queue)
            except StopIteration:
                queues.remove(queue)


def _drawn_of(
    concern: Concern, rng: random.Random, equivalents: set[tuple[str, str, str]]
) -> Iterator[tuple[Concern, Mutant]]:
    sources = {name: (ROOT / name).read_text(encoding="utf-8") for name in concern.sources}
    found: list[Place] = [p for name in sources for p in places(name, sources[name])]
    rng.shuffle(found)
    earlier: Counter[tuple[str, int]] = Counter()
    ranks = {}
    for place in found:
        ranks[place] = earlier[place.file, place.line]
        earlier[place.file, place.line] += 1
    for place in sorted(found, key=ranks.__getitem__):
        mutant = mutate(place, sources[place.file])
        if mutant and (place.file, _bare(mutant.before), _bare(mutant.after)) not in equivalents:
            yield concern, mutant


# Running --------------------------------------------------------------------------------------------------------------


def _preload() -> None:
    """Imports what the tests import of other people's, once for all runs."""
    for name in LIBRARIES:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def _copy(target: Path) -> Path:
    """The working tree as git sees it, with changes that are not committed."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def _time_limit(concern: Concern, slot: Path) -> float:
    """Three times what the tests take on unchanged sources, and a little. Exits unless they pass."""
    start = time.monotonic()
    job = _Job(concern, None, slot, start + 900)
    while job.outcome() is None:
        time.sleep(0.05)
    if job.outcome() != "survived":
        sys.exit(f"the tests of {concern.name} fail without any change:\n{job.output()[-3000:]}")
    seconds = time.monotonic() - start
    print(f"{concern.name}: its tests take {seconds:.0f} s", file=sys.stderr)
    return 3 * seconds + 15


def run(
    drawn: Iterator[tuple[Concern, Mutant]], count: int, slots: list[Path], limits: dict[str, float], end: float
) -> Iterator[Result]:
    """Runs `count` mutants, one in each slot at a time, and says of each how it ended."""
    free, jobs, started, done = list(slots), list[_Job](), 0, 0
    while True:
        while free and started < count and time.monotonic() < end:
            following = next(drawn, None)
            if following is None:
                count = started
                break
            concern, mutant = following
            jobs.append(_Job(concern, mutant, free.pop(), time.monotonic() + limits[concern.name]))
            started += 1
        if not jobs:
            return
        time.sleep(0.05)
        for job in list(jobs):
            outcome = job.outcome()
            if outcome is None:
                continue
            jobs.remove(job)
            free.append(job.slot)
            done += 1
            assert job.mutant is not None
            seconds = time.monotonic() - job.start
            print(f"{done} {outcome:9} {seconds:5.1f} s  {_describe(job.mutant)}", file=sys.stderr, flush=True)
            yield Result(job.concern.name, job.mutant, outcome, seconds)


class _Job:
    """A mutant's tests in a process of their own, forked from this one."""

    stamp = 0  # files changed so far; see `_write`

    def __init__(self, concern: Concern, mutant: Mutant | None, slot: Path, limit: float) -> None:
        self.concern, self.mutant, self.slot, self.limit, self.start = concern, mutant, slot, limit, time.monotonic()
        self._outcome: str | None = None
        if mutant is not None:
            self._original = (slot / mutant.place.file).read_text(encoding="utf-8")
            self._write(mutant.place.file, mutant.source)
        self.process = os.fork()
        if self.process == 0:
            _run_tests(concern.tests, slot)

    def outcome(self) -> str | None:
        """None while it runs."""
        if self._outcome is None:
            ended, status = os.waitpid(self.process, os.WNOHANG)
            if ended:
                self._outcome = "survived" if status == 0 else "killed"
            elif time.monotonic() > self.limit:
                os.killpg(self.process, signal.SIGKILL)
                os.waitpid(self.process, 0)
                self._outcome = "timed out"
            if self._outcome and self.mutant is not None:
                self._write(self.mutant.place.file, self._original)
        return self._outcome

    def output(self) -> str:
        return (self.slot / "mutant.log").read_text(encoding="utf-8", errors="replace")

    def _write(self, name: str, source: str) -> None:
        """With a date of its own, because Python takes a compiled file for current when date and size agree."""
        (self.slot / name).write_text(source, encoding="utf-8")
        _Job.stamp += 2
        os.utime(self.slot / name, (1_500_000_000 + _Job.stamp,) * 2)


def _run_tests(tests: list[list[str]], slot: Path) -> None:
    """In the forked process: pytest on the copy in `slot`. Does not return."""
    os.setsid()
    log = os.open(slot / "mutant.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(slot)
    os.environ["PYTHONPATH"] = str(slot)
    for name in [n for n in sys.modules if n.split(".")[0] == "tests"]:
        del sys.modules[name]  # they are the working tree's, not the copy's
    sys.path[:] = [str(slot), *(p for p in sys.path if p not in ("", str(ROOT)))]
    import pytest

    code = 1
    try:
        for arguments in tests:
            options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not network and not gpu"]
            code = pytest.main([*options, "--basetemp", str(slot / "tmp"), *arguments])
            if code:
                break
    finally:
        sys.stdout.flush()
        os._exit(int(code))


# What is shown --------------------------------------------------------------------------------------------------------


def _describe(mutant: Mutant) -> str:
    return f"{mutant.place.file}:{mutant.place.line}\n      - {mutant.before}\n      + {mutant.after}"


def table(results: list[Result], seed: int) -> str:
    """Markdown: how many of each concern's mutants were noticed, then those that were not."""
    lines = ["| concern | mutants | noticed | of these by time | survived |", "|--|--:|--:|--:|--:|"]
    for name in [*dict.fromkeys(r.concern for r in results), "all"]:
        counts = Counter(r.outcome for r in results if name in (r.concern, "all"))
        noticed = counts["killed"] + counts["timed out"]
        lines.append(f"| {name} | {counts.total()} | {noticed} | {counts['timed out']} | {counts['survived']} |")
    survivors = [_describe(r.mutant) for r in results if r.outcome == "survived"]
    caught = len(results) - len(survivors)
    score = (
        f"{caught} of {len(results)} mutants of seed {seed} were noticed, {100 * caught / max(1, len(results)):.1f} %."
    )
    return "\n".join([score, "", *lines, *(["", "Survived:", *survivors] if survivors else [])])


if __name__ == "__main__":
    sys.exit(main())
