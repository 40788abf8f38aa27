"""The command `tessera`. Results go to standard output, logs and progress bars to standard error.

Exit codes: 0 done, 1 failed, 2 wrong input (one sentence says what was wrong and what to do), 130 interrupted.
Nothing heavy is imported before a command runs, so `tessera --help` answers at once.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from common.errors import InputError

EXTRAS = {  # packages that only a few need, and the extra that brings each
    "emoji": "emoji",
    "fontTools": "emoji",
    "tensorboard": "track",
    "torchmetrics": "metrics",
    "uharfbuzz": "emoji",
}


def _group(help: str) -> typer.Typer:
    return typer.Typer(help=help, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


app = _group("Text to image in two stages: train your own, draw candidates, keep the best.")
evaluate_app = _group("Measure a tokenizer or the whole pipeline.")
data_app = _group("Look at data before training on it.")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(data_app, name="data")

AsJson = Annotated[bool, typer.Option("--json", help="Write JSON instead of a table.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY.SUB=VALUE", help="Changes to the recipe.")]
Recipe = Annotated[Path, typer.Argument(help="YAML recipe.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; whatever goes wrong is one line on standard error."""
    try:
        code = app(None if arguments is None else list(arguments), prog_name="tessera", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except InputError as error:
        _show_traceback()
        return _complain("error", str(error), 2)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own: an unknown command, a missing argument, a wrong number
            return _complain("error", _usage(error), 2)
        if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
            need = f"this needs the package {error.name}; pip install 'tessera[{EXTRAS[error.name]}]'"
            return _complain("failed", need, 1)
        hint = "" if _show_traceback() else " (TESSERA_DEBUG=1 shows the traceback)"
        return _complain("failed", f"{type(error).__name__}: {error}{hint}", 1)


def _complain(kind: str, message: str, code: int) -> int:
    print(f"tessera: {kind}: {' '.join(message.split())}", file=sys.stderr)
    return code


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "tessera"
    return f"{error.format_message().rstrip('.')}; see '{command} --help'"


def _show_traceback() -> bool:
    if os.environ.get("TESSERA_DEBUG", "0") in ("", "0"):
        return False
    traceback.print_exc()
    return True


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show it and exit.")] = False
) -> None:
    """Text to image in two stages: train your own, draw candidates, keep the best."""
    if version:
        from importlib.metadata import version as installed

        print(f"tessera {installed('tessera')}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


# Pictures -------------------------------------------------------------------------------------------------------------


@app.command()
def rerank(
    prompt: Annotated[str, typer.Argument(help="What the pictures should show.")],
    images: Annotated[list[Path], typer.Argument(help="Picture files.")],
    model: Annotated[
        str, typer.Option(help="A reranker's or a bundle's folder, a shipped bundle, or a model name of open_clip.")
    ] = "emoji",
    weights: Annotated[str | None, typer.Option(help="Weights of an open_clip model: a tag or a file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Order pictures by how well they fit a prompt, best first."""
    from pipelines.rank import rank

    start = time.perf_counter()
    ranked = rank(prompt, images, model, weights)
    if as_json:
        _print_json({"prompt": prompt, "model": model, "results": [r._asdict() for r in ranked]})
    else:
        _print_table([{"rank": r.rank, "score": f"{r.score:.4f}", "image": r.image} for r in ranked])
    _say_rate(len(ranked), time.perf_counter() - start)


# Training -------------------------------------------------------------------------------------------------------------


class Trainable(StrEnum):
    tokenizer = "tokenizer"
    prior = "prior"
    reranker = "reranker"
    text_tokenizer = "text-tokenizer"


@app.command()
def train(part: Trainable, recipe: Recipe, overrides: Overrides = None) -> None:
    """Train one part as its recipe says; started again, it goes on where it stopped."""
    match part:
        case Trainable.tokenizer:
            from stage1_tokenizer.train import train as run
        case Trainable.prior:
            from stage2_prior.train import train as run
        case Trainable.reranker:
            from rerank.train import train as run
        case Trainable.text_tokenizer:
            from stage2_prior.train_text import train as run
    run(recipe, overrides or [])


@app.command()
def encode(recipe: Recipe, overrides: Overrides = None) -> None:
    """Turn a data folder into codes once, which is what a prior trains on."""
    from stage2_prior.encode import encode as run

    run(recipe, overrides or [])


# Measuring ------------------------------------------------------------------------------------------------------------


@evaluate_app.command("tokenizer")
def evaluate_tokenizer(
    model: Annotated[str, typer.Argument(help="A tokenizer's folder or hub name.")],
    data: Annotated[Path, typer.Argument(help="A data folder.")],
    split: Annotated[str | None, typer.Option(help="One split of the data; all of it when left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Encode and decode pictures and say how much of them survives."""
    from stage1_tokenizer.evaluate import evaluate

    _print_report(evaluate(model, data, split), as_json)


@evaluate_app.command("pipeline")
def evaluate_pipeline(recipe: Recipe, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Draw the prompts of a recipe and have its judge say how many pictures are right."""
    from pipelines.evaluate import evaluate

    _print_report(evaluate(recipe, overrides or []), as_json)


# Folders --------------------------------------------------------------------------------------------------------------


@data_app.command("check")
def check_data(
    folder: Annotated[Path, typer.Argument(help="A data folder.")],
    split: Annotated[str | None, typer.Option(help="One split of it; all of it when left out.")] = None,
    images_only: Annotated[bool, typer.Option("--images-only", help="Captions are not needed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read every picture and caption and count what training would meet."""
    from pipelines.check import check

    _print_report(check(folder, split, images_only), as_json)


@app.command()
def info(
    folder: Annotated[str, typer.Argument(help="A folder of a bundle, a part or data, or a shipped bundle's name.")],
    as_json: AsJson = False,
) -> None:
    """Say what a folder holds, without loading it."""
    from pipelines.info import describe

    _print_report(describe(folder), as_json)


# Printing -------------------------------------------------------------------------------------------------------------


def _print_json(content: object) -> None:
    print(json.dumps(content, ensure_ascii=False, indent=2))


def _print_table(rows: list[dict[str, object]]) -> None:
    """Rows with the same keys, in columns as wide as their widest cell."""
    lines = [list(rows[0])] + [[str(value) for value in row.values()] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_report(report: dict[str, Any], as_json: bool) -> None:
    """Figures with their names, one a line; a figure of several parts below its name."""
    if as_json:
        _print_json(report)
    else:
        _print_lines(report, "")


def _print_lines(report: dict[str, Any], indent: str) -> None:
    width = max((len(name) for name in report), default=0)
    for name, value in report.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:" + ("" if value else " none"))
            _print_lines(value, indent + "  ")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], str) and len(" ".join(value)) > 60:
            print(f"{indent}{name}:")
            print("\n".join(f"{indent}  {line}" for line in value))
        else:
            print(f"{indent}{name.ljust(width)}  {_readable(value)}")


def _readable(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(_readable(part) for part in value) or "none"
    return "none" if value is None else str(value)


def _say_rate(images: int, seconds: float) -> None:
    print(f"{images} images in {seconds:.1f} s, {images / seconds:.1f} images per second", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
