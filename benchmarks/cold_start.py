"""Where the time of a cold `tessera generate` goes: from the start of the process to files on disk, in parts.

    python benchmarks/cold_start.py --repeats 5

The shipped bundle, 16 candidates of one prompt, one thread, files in the cache (one run before those that count).
Processor seconds say more than wall seconds on a machine that does other things too. Model work is drawing, which
includes packing the prior's weights, decoding and ranking; everything else is what the command spends around it.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a red heart above a blue circle"
MODEL_WORK = ("drawing", "decoding", "ranking")
PARTS = ("imports", "loading", *MODEL_WORK, "writing", "the rest")  # the rest: options, origins, end of the process


def measure(candidates: int) -> dict[str, tuple[float, float]]:
    """(processor seconds, wall seconds) of each of PARTS and "in all", of one command in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--candidates", str(candidates)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        before, start = _children(), time.perf_counter()
        subprocess.run([*command, "--report", str(report)], check=True, capture_output=True, env=environment)
        total = _children() - before, time.perf_counter() - start
        parts = {name: tuple(both) for name, both in json.loads(report.read_text(encoding="utf-8")).items()}
    rest = tuple(whole - sum(both[i] for both in parts.values()) for i, whole in enumerate(total))
    return {**parts, "the rest": (rest[0], rest[1]), "in all": total}


def run_command(candidates: int, report: Path) -> None:
    """The command, in this process, with its parts timed; the report has seconds of the processor and of the wall."""
    start = time.perf_counter()
    from pipelines import cli
    from pipelines.cli.app import importing

    with importing():  # as the command does
        import pipelines.generate as generate
        import pipelines.output as output
        import pipelines.text_to_image as text_to_image
        from pipelines.bundle import Bundle
        from rerank import ClipReranker
    # The interpreter's own start is counted in; on the wall it is in the rest.
    parts = {"imports": [time.process_time(), time.perf_counter() - start]}

    def timed(owner: Any, function: str, name: str) -> None:
        setattr(owner, function, _timed(getattr(owner, function), parts.setdefault(name, [0.0, 0.0])))

    timed(text_to_image, "load_bundle", "loading")
    timed(text_to_image, "make_engine", "drawing")
    timed(generate, "sample_scored", "drawing")
    timed(Bundle, "decode", "decoding")
    timed(ClipReranker, "score", "ranking")
    timed(output, "_write", "writing")
    keep = str(min(4, candidates))
    with tempfile.TemporaryDirectory() as folder:
        code = cli.main(["generate", "-n", keep, "--candidates", str(candidates), "-o", folder, "--", PROMPT])
    report.write_text(json.dumps(parts), encoding="utf-8")
    sys.exit(code)


def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    @wraps(function)
    def run(*arguments: Any, **keywords: Any) -> Any:
        # Of the calling thread alone: another may draw meanwhile.
        processor, wall = time.thread_time(), time.perf_counter()
        try:
            return function(*arguments, **keywords)
        finally:
            seconds[0] += time.thread_time() - processor
            seconds[1] += time.perf_counter() - wall

    return run


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)  # be the process that is measured
    arguments = parser.parse_args()
    if arguments.report is not None:
        run_command(arguments.candidates, arguments.report)
    measure(arguments.candidates)
    rounds = [measure(arguments.candidates) for _ in range(arguments.repeats)]
    medians = {name: [statistics.median(one[name][i] for one in rounds) for i in (0, 1)] for name in rounds[0]}
    around = [name for name in PARTS if name not in MODEL_WORK]
    medians["outside model work"] = [
        statistics.median(sum(one[name][i] for name in around) for one in rounds) for i in (0, 1)
    ]
    print(f"medians of {arguments.repeats} runs      processor s   wall s")
    for name, (processor, wall) in medians.items():
        print(f"{name:<22} {processor:>14.2f} {wall:>8.2f}")


if __name__ == "__main__":
    main()
