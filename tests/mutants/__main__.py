"""Plants small faults and counts how many the tests notice: `make mutants`, or `python -m tests.mutants --help`.

The working tree is copied, each mutant is written into the copy, and pytest runs the tests of the file's concern there
(concerns.yaml) until one fails. Every run is forked from a process that has imported torch and the other libraries, so
it starts at once. A mutant that no test notices survives; equivalents.yaml lists those that do not change behaviour,
each with the reason, and they are not drawn. docs/testing.md has the score.
"""

import argparse
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.mutants.mutations import Mutant, Place, mutate, places
from tests.mutants.tables import ROOT, Concern, Equivalents, bare, read_concerns, read_equivalents

LIBRARIES = """pytest hypothesis numpy PIL.Image yaml pydantic typer tqdm einops safetensors.torch torch
    torch.utils.tensorboard torchvision transformers tokenizers open_clip accelerate ftfy huggingface_hub
    peft torchmetrics""".split()


def main() -> int:
    arguments = _arguments()
    concerns = read_concerns(arguments.only)
    equivalents = read_equivalents()
    _preload()
    with tempfile.TemporaryDirectory(prefix="tessera-mutants-") as scratch:
        slots = [_copy(Path(scratch) / str(number)) for number in range(arguments.jobs)]
        drawn: Iterator[tuple[Concern, Mutant]]
        if arguments.again:
            drawn = survivors_of(arguments.again, concerns, equivalents)
        else:
            drawn = itertools.islice(draw(concerns, arguments.seed, equivalents), arguments.count)
        if arguments.list:
            for concern, mutant in drawn:
                print(f"{concern.name}: {_describe(mutant)}")
            return 0
        end = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
        limits, jobs = time_limits(concerns, slots), list[_Job]()
        for job in finished(drawn, slots, limits, end):
            jobs.append(job)
            words = f"{len(jobs)} {job.outcome:9} {job.seconds:5.1f} s"
            print(f"{words}  {_describe(job.mutant)}", file=sys.stderr, flush=True)
            if arguments.json:
                record(jobs, arguments.json)
    print(table(jobs, arguments.seed))
    caught = sum(job.outcome != "survived" for job in jobs)
    return 0 if caught >= 0.95 * len(jobs) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="mutants, the same number of each concern")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--minutes", type=float, help="start no further mutant after this long")
    parser.add_argument("--only", nargs="+", default=["*"], help="concerns or files: losses 'stage2_prior/sampling/*'")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--json", type=Path, help="file for the outcome of each")
    parser.add_argument("--again", type=Path, help="instead of a sample, the survivors in a file that --json wrote")
    parser.add_argument("--list", action="store_true", help="show the sample and run nothing")
    return parser.parse_args()


# The sample -----------------------------------------------------------------------------------------------------------


def draw(concerns: list[Concern], seed: int, equivalents: Equivalents) -> Iterator[tuple[Concern, Mutant]]:
    """Mutants in random order, the concerns in turn, one of each line before a second of any."""
    queues = [_drawn_of(c, seed, equivalents) for c in concerns]
    while queues:
        for queue in list(queues):
            try:
                yield next(queue)
            except StopIteration:
                queues.remove(queue)


def survivors_of(record: Path, concerns: list[Concern], equivalents: Equivalents) -> Iterator[tuple[Concern, Mutant]]:
    """Those of an earlier run whose lines are still there."""
    by_name = {concern.name: concern for concern in concerns}
    for row in json.loads(record.read_text(encoding="utf-8")):
        if row["outcome"] != "survived" or row["concern"] not in by_name:
            continue
        source = (ROOT / row["file"]).read_text(encoding="utf-8")
        lines, looked_for = source.splitlines(), (row["file"], bare(row["before"]), bare(row["after"]))
        for place in places(row["file"], source):
            if place.operator == row["operator"] and bare(lines[place.line - 1]) == looked_for[1]:
                mutant = mutate(place, source)
                if mutant and _key(mutant) == looked_for and looked_for not in equivalents:
                    yield by_name[row["concern"]], mutant
                    break


def _drawn_of(concern: Concern, seed: int, equivalents: Equivalents) -> Iterator[tuple[Concern, Mutant]]:
    sources = {name: (ROOT / name).read_text(encoding="utf-8") for name in concern.sources}
    found: list[Place] = [p for name in sources for p in places(name, sources[name])]
    lines = {name: source.splitlines() for name, source in sources.items()}
    # By a number of each place's own, so that a change elsewhere in the file leaves the sample as it is.
    found.sort(key=lambda p: random.Random(f"{seed} {p.file} {lines[p.file][p.line - 1]} {p.operator}").random())
    earlier: Counter[tuple[str, int]] = Counter()
    ranks = {}
    for place in found:
        ranks[place] = earlier[place.file, place.line]
        earlier[place.file, place.line] += 1
    for place in sorted(found, key=ranks.__getitem__):
        mutant = mutate(place, sources[place.file])
        if mutant and _key(mutant) not in equivalents:
            yield concern, mutant


def _key(mutant: Mutant) -> tuple[str, str, str]:
    return mutant.place.file, bare(mutant.before), bare(mutant.after)


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


def time_limits(concerns: list[Concern], slots: list[Path]) -> dict[str, float]:
    """By concern, three times the seconds its tests take on unchanged sources, and a little. Exits unless they pass."""
    limits = {}
    for job in finished(
        ((concern, None) for concern in concerns), slots, dict.fromkeys((c.name for c in concerns), 900)
    ):
        if job.outcome != "survived":
            sys.exit(f"the tests of {job.concern.name} fail without any change:\n{job.output[-3000:]}")
        limits[job.concern.name] = 3 * job.seconds + 15
        print(f"{job.concern.name}: its tests take {job.seconds:.0f} s", file=sys.stderr, flush=True)
    return limits


def finished(
    todo: Iterator[tuple[Concern, Mutant | None]],
    slots: list[Path],
    limits: Mapping[str, float],
    end: float = float("inf"),
) -> Iterator["_Job"]:
    """Runs the tests of each, one in every slot at a time, none started after `end`; the jobs as they finish."""
    free, jobs = list(slots), list[_Job]()
    while True:
        while free and time.monotonic() < end and (following := next(todo, None)) is not None:
            jobs.append(_Job(*following, free.pop(), limits[following[0].name]))
        if not jobs:
            return
        time.sleep(0.05)
        for job in list(jobs):
            if job.poll():
                jobs.remove(job)
                free.append(job.slot)
                yield job


class _Job:
    """A concern's tests on one mutant, or on the sources as they are, in a process forked from this one."""

    stamp = 0  # files changed so far; see `_write`

    def __init__(self, concern: Concern, mutant: Mutant | None, slot: Path, limit: float) -> None:
        self.concern, self.mutant, self.slot = concern, mutant, slot
        self.start, self.limit, self.seconds, self.outcome, self.output = time.monotonic(), limit, 0.0, "", ""
        if mutant is not None:
            self._original = (slot / mutant.place.file).read_text(encoding="utf-8")
            self._write(mutant.place.file, mutant.source)
        self.process = os.fork()
        if self.process == 0:
            _run_tests(concern.tests, slot)

    def poll(self) -> bool:
        """Whether it has come to an end; then `outcome` is killed, survived or timed out."""
        self.seconds = time.monotonic() - self.start
        ended, status = os.waitpid(self.process, os.WNOHANG)
        if ended:
            self.outcome = "survived" if status == 0 else "killed"
        elif self.seconds > self.limit:
            os.killpg(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
            self.outcome = "timed out"
        else:
            return False
        self.output = (self.slot / "mutant.log").read_text(encoding="utf-8", errors="replace")
        if self.mutant is not None:
            self._write(self.mutant.place.file, self._original)
        return True

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


def _describe(mutant: Mutant | None) -> str:
    assert mutant is not None  # as only of unchanged sources
    return f"{mutant.place.file}:{mutant.place.line}\n      - {mutant.before}\n      + {mutant.after}"


def record(jobs: list[_Job], file: Path) -> None:
    """The outcome of each so far as JSON."""
    rows = [
        {**job.mutant.place._asdict(), "before": job.mutant.before, "after": job.mutant.after}
        | {"concern": job.concern.name, "outcome": job.outcome, "seconds": round(job.seconds, 1)}
        for job in jobs
        if job.mutant is not None
    ]
    file.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table(jobs: list[_Job], seed: int) -> str:
    """Markdown: how many of each concern's mutants were noticed, then those that were not."""
    lines = ["| concern | mutants | noticed | of these by time | survived |", "|--|--:|--:|--:|--:|"]
    for name in [*dict.fromkeys(job.concern.name for job in jobs), "all"]:
        counts = Counter(job.outcome for job in jobs if name in (job.concern.name, "all"))
        noticed = counts["killed"] + counts["timed out"]
        lines.append(f"| {name} | {counts.total()} | {noticed} | {counts['timed out']} | {counts['survived']} |")
    survivors = [_describe(job.mutant) for job in jobs if job.outcome == "survived"]
    share = 100 * (1 - len(survivors) / max(1, len(jobs)))
    score = f"{len(jobs) - len(survivors)} of {len(jobs)} mutants of seed {seed} were noticed, {share:.1f} %."
    return "\n".join([score, "", *lines, *(["", "Survived:", *survivors] if survivors else [])])


if __name__ == "__main__":
    sys.exit(main())
