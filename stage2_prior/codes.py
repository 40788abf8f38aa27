"""Images as codes on disk: what `tessera encode` writes once and the prior trains on.

A folder of `codes-00000.safetensors`, ..., `captions.jsonl` with a line for each picture of the data (`text`, `weight`,
and the number of its class as `label` where pictures have labels) and `meta.json` (tokenizer fingerprint, codebook
size, code shape, shard sizes, names of the classes). A shard holds `codes`, (n, Q, h, w) int32, of the pictures that
can be read; `items`, (n,) int64, which lines of the captions they belong to; `pictures`, (n, 16) uint8, digests of the
files they were made from; and where the pictures have segmentation maps `segmentation`, the codes that the maps' own
tokenizer gives them. Shards of earlier releases hold codes alone, one for each line.
"""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from stage2_prior.base import flatten_codes
from tessera.config import Config, validate
from tessera.data.source import Order
from tessera.errors import InputError
from tessera.files import read_json, read_json_lines

META = "meta.json"
CAPTIONS = "captions.jsonl"


class SegmentationMeta(Config):
    tokenizer_fingerprint: str
    codebook_size: int = Field(gt=0)
    code_shape: tuple[int, int, int]  # Q, h, w


class CodesMeta(Config):
    tokenizer_fingerprint: str
    codebook_size: int = Field(gt=0)
    code_shape: tuple[int, int, int]  # Q, h, w
    rows: int = Field(gt=0)  # pictures of the data, those that cannot be read among them
    shard_rows: int = Field(gt=0)  # pictures a shard, the last may have fewer
    class_names: tuple[str, ...] = ()  # in the order of their numbers; empty where pictures have no labels
    segmentation: SegmentationMeta | None = None  # of the maps' codes; null where pictures have no maps

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)


class CodesBatch(NamedTuple):
    codes: Tensor  # (B, T) int64
    captions: list[str]  # one of each image's captions, drawn anew every time
    labels: list[int]  # of their classes; empty where the pictures have no labels
    segmentation: Tensor | None  # (B, Q, h, w) int64, codes of their maps; None where they have none


class Codes:
    """All codes of a folder, in memory."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder = Path(folder)
        if not (folder / META).is_file():
            raise InputError(f"{folder} has no {META}; write the codes with tessera encode")
        self.meta = validate(CodesMeta, read_json(folder / META, "encode again"), where=str(folder / META))
        try:
            shards = [load_file(folder / shard_name(i)) for i in range(self.meta.shards)]
            codes = torch.cat([shard["codes"] for shard in shards])
            maps = None if self.meta.segmentation is None else torch.cat([shard["segmentation"] for shard in shards])
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"{folder} is not complete ({error}); run tessera encode again") from None
        self.codes = flatten_codes(codes)  # (rows, T) int32
        self.segmentation = maps  # (rows, Q, h, w) int32
        items = torch.cat([shard["items"] for shard in shards]) if "items" in shards[0] else torch.arange(len(codes))
        lines = [row for _, row in read_json_lines(folder / CAPTIONS, "encode again")]
        if len(lines) != self.meta.rows or len(items) != len(codes) or int(items.max()) >= len(lines):
            raise InputError(f"{folder} has {len(codes)} rows of codes and {len(lines)} of captions; encode again")
        rows = [lines[item] for item in items.tolist()]
        self.captions = [tuple(row["text"]) for row in rows]
        self.weights = [float(row["weight"]) for row in rows]
        self.labels = [int(row["label"]) for row in rows] if self.meta.class_names else []

    @property
    def identity(self) -> str:
        """Changes with anything a prior could learn from: codes, captions, weights, labels, maps, and their order."""
        digest = sha256(self.codes.numpy().tobytes())
        if self.segmentation is not None:
            digest.update(self.segmentation.contiguous().numpy().tobytes())
        digest.update(repr((self.captions, self.weights, self.labels, self.meta.class_names)).encode())
        return f"{len(self)} rows (fingerprint {digest.hexdigest()[:16]})"

    def __len__(self) -> int:
        return len(self.codes)

    def batch(self, indices: Sequence[int] | np.ndarray, captions: list[str]) -> CodesBatch:
        """The rows at `indices`, with these captions."""
        labels = [self.labels[index] for index in indices] if self.labels else []
        maps = None if self.segmentation is None else self.segmentation[indices].long()
        return CodesBatch(self.codes[indices].long(), captions, labels, maps)


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
        return self.source.batch(indices, captions)


def shard_name(number: int) -> str:
    return f"codes-{number:05d}.safetensors"
