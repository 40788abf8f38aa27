"""Images as codes on disk: what `tessera encode` writes once and the prior trains on.

A folder of `codes-00000.safetensors`, ... (each `codes`, (n, Q, h, w) int32), `captions.jsonl` with a line for each row
(`text`, `weight`) and `meta.json` (tokenizer fingerprint, codebook size, code shape, shard sizes). Shards are written
whole or not at all and found ones are kept, so encoding can be stopped and goes on where it was.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from common.config import Config, validate
from common.data import Order
from common.errors import InputError
from stage2_prior.base import flatten_codes

META = "meta.json"
CAPTIONS = "captions.jsonl"


class CodesMeta(Config):
    tokenizer_fingerprint: str
    codebook_size: int = Field(gt=0)
    code_shape: tuple[int, int, int]  # Q, h, w
    rows: int = Field(gt=0)
    shard_rows: int = Field(gt=0)  # rows a shard, the last may have fewer

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)


class CodesBatch(NamedTuple):
    codes: Tensor  # (B, T) int64
    captions: list[str]  # one of each image's captions, drawn anew every time


class Codes:
    """All codes of a folder, in memory."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        if not (folder / META).is_file():
            raise InputError(f"{folder} has no {META}; write the codes with tessera encode")
        self.meta = validate(CodesMeta, json.loads((folder / META).read_text()), where=str(folder / META))
        try:
            shards = [load_file(folder / shard_name(i))["codes"] for i in range(self.meta.shards)]
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"{folder} is not complete ({error}); run tessera encode again") from None
        self.codes = flatten_codes(torch.cat(shards))  # (rows, T) int32
        lines = (folder / CAPTIONS).read_text(encoding="utf-8").splitlines()
        if not len(lines) == len(self.codes) == self.meta.rows:
            raise InputError(f"{folder} has {len(self.codes)} rows of codes and {len(lines)} of captions; encode again")
        rows = [json.loads(line) for line in lines]
        self.captions = [tuple(row["text"]) for row in rows]
        self.weights = [float(row["weight"]) for row in rows]

    def __len__(self) -> int:
        return len(self.codes)


class CodesSteps(Dataset[CodesBatch]):
    """`steps[i]` is the batch of training step i, a pure function of (seed, i) and the process."""

    def __init__(self, source: Codes, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.source, self.seed, self.rank, self.world = source, seed, rank, world
        self.order = Order(source.weights, batch_size, seed)

    def __getitem__(self, step: int) -> CodesBatch:
        indices = self.order.batch(step)[self.rank :: self.world]
        draws = np.random.default_rng((self.seed, step, self.rank)).random(len(indices))
        captions = []
        for index, draw in zip(indices, draws, strict=True):
            choices = self.source.captions[index] or ("",)
            captions.append(choices[int(draw * len(choices))])
        return CodesBatch(self.source.codes[indices].long(), captions)


def shard_name(number: int) -> str:
    return f"codes-{number:05d}.safetensors"
