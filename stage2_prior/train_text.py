"""Trains the byte-level BPE text tokenizer on the captions of a data folder: `tessera train text-tokenizer`."""

import logging
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from stage2_prior.truncation import describe, truncation
from tessera import logs
from tessera.config import Config, read_recipe
from tessera.data.folder import Item, read_folder
from tessera.data.source import DataConfig
from tessera.errors import InputError
from tessera.text import TextTokenizer
from tessera.weights.writing import refuse_data_folder, refuse_foreign

logger = logging.getLogger("stage2_prior")


class TextRecipe(Config):
    data: DataConfig
    vocab_size: int = Field(4096, ge=259, le=2**24)  # 256 bytes and 3 specials at least
    lower_case: bool = False  # capitals read as small letters: for captions without them, and less to learn
    text_length: int | None = Field(None, ge=2)  # of the prior it is for; says what of each language would be cut
    output: Path


def train(recipe_path: str | Path, overrides: list[str] | None = None) -> Path:
    """Trains and saves the text tokenizer of a recipe; returns its folder."""
    recipe = read_recipe(TextRecipe, recipe_path, overrides)
    refuse_data_folder(recipe.output, recipe.data.folder, "output")
    logs.show()
    refuse_foreign(recipe.output)
    items, _, without_text = read_folder(recipe.data.folder, recipe.data.split)
    if not any(item.captions for item in items):
        raise InputError(
            f"{recipe.data.folder} has pictures but no captions to train a text tokenizer on; {without_text}"
        )
    tokenizer = TextTokenizer.train(_captions(items), recipe.vocab_size, recipe.lower_case)
    tokenizer.save_pretrained(recipe.output)
    captions = list(_captions(items))
    lengths = sorted(tokenizer.lengths(captions))
    logger.info(
        "%s: %d tokens; captions have %d tokens in the median, %d at the 99th percentile, %d at most",
        recipe.output, tokenizer.vocab_size, lengths[len(lengths) // 2], lengths[int(len(lengths) * 0.99)], lengths[-1],
    )  # fmt: skip
    if recipe.text_length is not None:
        logger.info("%s", describe(truncation(tokenizer, captions, recipe.text_length), recipe.text_length))
    return recipe.output


def _captions(items: list[Item]) -> Iterator[str]:
    return (caption for item in items for caption in item.captions)
