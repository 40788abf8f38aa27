"""Results for people and for machines."""

import json
import sys
from dataclasses import asdict
from typing import Any


def show_generated(report: Any, as_json: bool) -> None:
    """Where the images of a `pipelines.output.Report` are, and how long they took."""
    if as_json:
        print_json(asdict(report))
        return
    for one in report.prompts:
        print(one.prompt)
        rows: list[dict[str, object]] = []
        for picture in one.images:
            scored = {"score": "-" if picture.score is None else f"{picture.score:.3f}"}
            likely = {} if picture.log_prob is None else {"log p": f"{picture.log_prob:.2f}"}
            rows.append({**scored, **likely, "seed": picture.seed, "picture": picture.path})
        print_table(rows)
        if one.sheet is not None:
            print(f"all candidates: {one.sheet}")
        print()
    rate = f"{report.images_per_second:.2f} images per second"
    pruned = "" if report.finished == report.candidates else f" of {report.candidates} candidates"
    say(f"{report.finished} images{pruned} in {report.seconds:.1f} s with loading and writing, {rate} once loaded")


def show_replayed(replayed: Any, as_json: bool) -> None:
    if as_json:
        print_json(asdict(replayed))
        return
    print(replayed.path)
    say(f"{'equal' if replayed.identical else 'NOT equal'} to the picture, drawn in {replayed.seconds:.1f} s")


def print_json(content: object) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=2)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # an escape of ours would not be JSON
        text = json.dumps(content, indent=2)
    print(text)


def print_table(rows: list[dict[str, object]]) -> None:
    """Rows with the same keys, in columns as wide as their widest cell."""
    lines = [list(rows[0])] + [[str(value) for value in row.values()] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_report(report: dict[str, Any], as_json: bool) -> None:
    """Figures with their names, one a line; a figure of several parts below its name."""
    if as_json:
        print_json(report)
    else:
        _print_lines(report, "")


def _print_lines(report: dict[str, Any], indent: str) -> None:
    width = max((len(name) for name in report), default=0)
    for name, value in report.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:" + ("" if value else " none"))
            _print_lines(value, indent + "  ")
        elif _is_long_list(value):
            print(f"{indent}{name}:")
            print("\n".join(f"{indent}  {line}" for line in value))
        else:
            print(f"{indent}{name.ljust(width)}  {_readable(value)}")


def _is_long_list(value: object) -> bool:
    texts = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
    return texts and len(" ".join(value)) > 60  # type: ignore[arg-type]


def _readable(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(_readable(part) for part in value) or "none"
    return "none" if value is None else str(value)


def say(message: str) -> None:
    print(message, file=sys.stderr)
