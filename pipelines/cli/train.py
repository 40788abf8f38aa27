"""`tessera train`, `finetune`, `merge` and `encode`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.app import LoraOptions, Overrides, Recipe, app, command, weighted
from tessera.errors import InputError


class Trainable(StrEnum):
    tokenizer = "tokenizer"
    prior = "prior"
    reranker = "reranker"
    text_tokenizer = "text-tokenizer"


@command(app)
def train(part: Trainable, recipe: Recipe, overrides: Overrides = None) -> None:
    """Train one part as its recipe says; started again, it continues where it stopped."""
    match part:
        case Trainable.tokenizer:
            from stage1_tokenizer.train import train as run
        case Trainable.prior:
            from stage2_prior.train import train as run
        case Trainable.reranker:
            from rerank.train import train as run
        case Trainable.text_tokenizer:
            from stage2_prior.train_text import train as run
    print(run(recipe, overrides or []))


class Finetunable(StrEnum):
    prior = "prior"


@command(app)
def finetune(
    part: Annotated[Finetunable, typer.Argument(help="The part to teach.")], recipe: Recipe, overrides: Overrides = None
) -> None:
    """Teach a trained part something new by LoRA; started again, it continues where it stopped."""
    from stage2_prior.finetune import finetune as run

    print(run(recipe, overrides or []))


@command(app)
def merge(
    model: Annotated[str, typer.Argument(help="A bundle, or a prior's folder.")],
    loras: LoraOptions = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder of the result.")] = None,
) -> None:
    """Make LoRAs part of a model for good, and write it as a model of the same kind."""
    from pipelines.merge import merge as run

    if not loras or out is None:
        raise InputError("there is nothing to merge; give --lora FOLDER[:WEIGHT] and --out FOLDER")
    print(run(model, weighted(loras), out))


@command(app)
def encode(recipe: Recipe, overrides: Overrides = None) -> None:
    """Turn a data folder into codes once, which is what a prior trains on."""
    from stage2_prior.encode import encode as run

    print(run(recipe, overrides or []))
