"""The command's groups, and what its commands share. Nothing heavy is imported before a command runs."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cli.failures import bad_file_sentence
from tessera.errors import InputError
from tessera.paths import expand


def _group(help: str) -> typer.Typer:
    return typer.Typer(help=help, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


app = _group("Text to image in two stages: train your own, draw candidates, keep the best.")
evaluate_app = _group("Measure a tokenizer, a prior or the whole pipeline.")
data_app = _group("Look at data before training on it.")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(data_app, name="data")

AsJson = Annotated[bool, typer.Option("--json", help="Write JSON instead of a table.")]
LoraOptions = Annotated[
    list[str] | None, typer.Option("--lora", metavar="FOLDER[:WEIGHT]", help="Draw with a LoRA; several are fine.")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY.SUB=VALUE", help="Changes to the recipe.")]
BUNDLE = "A shipped bundle, a bundle's folder, or a hub name."
Recipe = Annotated[Path, typer.Argument(help="YAML recipe.")]


def command(group: typer.Typer, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds a command to a group. What it is given as a `Path` is expanded, and text that the locale could not read is
    read as UTF-8."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def run(**given: Any) -> None:
            try:
                function(**{name: as_meant(value) for name, value in given.items()})
            except EOFError as error:  # click would take it for the end of what is typed
                raise InputError(bad_file_sentence(error)) from error

        group.command(name)(run)
        return function

    return add


def as_meant(value: Any) -> Any:
    if isinstance(value, list):
        return [as_meant(one) for one in value]
    if isinstance(value, Path):
        return expand(value)
    if isinstance(value, str) and any("\udc80" <= character <= "\udcff" for character in value):
        with suppress(UnicodeError):
            return os.fsencode(value).decode("utf-8")
    return value


@contextmanager
def importing() -> Iterator[None]:
    """Around torch's first import. What that makes stays until the end, and looking for garbage among it, while it is
    made and when the process ends, takes a third as long as making it; so the collector does not look."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


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


def weighted(loras: list[str] | None) -> list[tuple[str, float]]:
    """The folder and the weight in each FOLDER[:WEIGHT]. Raises InputError for a weight that is no number."""
    found = []
    for text in loras or []:
        folder, colon, weight = text.rpartition(":")
        if not colon or os.path.lexists(expand(text)):
            found.append((text, 1.0))
            continue
        try:
            found.append((folder, float(weight)))
        except ValueError:
            raise InputError(f"--lora {text}: the weight '{weight}' is not a number; write FOLDER:0.8") from None
    return found
