"""Images as codes on disk: what `tessera encode` writes once and the prior trains on.

A folder of `codes-00000.safetensors`, ..., `captions.jsonl` with a line for each image of the data (`text`, `weight`,
and the number of its class as `label` where images have labels) and `meta.json` (tokenizer fingerprint, codebook
size, code shape, shard sizes, names of the classes). A shard holds `codes`, (n, Q, h, w) int32, of the images that
can be read; `items`, (n,) int64, which lines of the captions they belong to; `images`, (n, 16) uint8, digests of the
files they were made from; and where the images have segmentation maps `segmentation`, the codes that the maps' own
tokenizer gives them. Shards of earlier releases hold codes alone, one for each line.
"""

import json
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from pydantic import Field
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from stage2_prior.base import flatten_codes
from tessera.config import Config, validate
from tessera.data.order import Order
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
    rows: int = Field(gt=0)  # images of the data, those that cannot be read among them
    shard_rows: int = Field(gt=0)  # images a shard, the last may have fewer
    class_names: tuple[str, ...] = ()  # in the order of their numbers; empty where images have no labels
    segmentation: SegmentationMeta | None = None  # of the maps' codes; null where images have no maps

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)


class CodesBatch(NamedTuple):
    codes: Tensor  # (B, T) int64
    captions: list[str]  # one of each image's captions, drawn anew every time
    labels: list[int]  # of their classes; empty where the images have no labels
    segmentation: Tensor | None  # (B, Q, h, w) int64, codes of their maps; None where they have none


class MappedRows:
    """The rows of one tensor of several safetensors files, read from disk when they are asked for."""

    def __init__(self, files: Sequence[Path], name: str) -> None:
        """Raises OSError, KeyError or ValueError for a file that is missing, cut off, or lacks the tensor."""
        self._files = [_place(file, name) for file in files]
        self._starts = np.cumsum([0, *(shape[0] for _, _, _, shape in self._files)])
        self._maps: list[np.memmap | None] = [None] * len(files)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": [None] * len(self._files)}  # a loader process opens files of its own

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n, ...) in the order of `rows`."""
        rows = np.asarray(rows, dtype=np.int64)
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        found = np.empty((len(rows), *self._files[0][3][1:]), dtype=self._files[0][2])
        for shard in np.unique(shards):
            where = shards == shard
            found[where] = self._map(int(shard))[rows[where] - self._starts[shard]]
        return found

    def chunks(self, size: int = 4096) -> Iterator[np.ndarray]:
        """All rows, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.read(range(start, min(start + size, len(self))))

    def _map(self, shard: int) -> np.memmap:
        if self._maps[shard] is None:
            file, offset, dtype, shape = self._files[shard]
            self._maps[shard] = np.memmap(file, dtype, "r", offset, shape)
        mapped = self._maps[shard]
        assert mapped is not None
        return mapped


DTYPES: dict[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8")}


def _place(file: Path, name: str) -> tuple[Path, int, np.dtype, tuple[int, ...]]:
    """Where a tensor of a safetensors file lies: 8 bytes of the header's length, the header, then the numbers."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError(f"{file.name} is cut off")
        header = json.loads(opened.read(length))
    entry = header[name]
    dtype, shape, (first, last) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if 8 + length + last > file.stat().st_size or last - first != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"{file.name} is cut off")
    return file, 8 + length + first, dtype, shape


class Codes:
    """The codes of a folder, mapped from disk: a `Source` of codes instead of images."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder = Path(folder)
        if not (folder / META).is_file():
            raise InputError(f"{folder} has no {META}; write the codes with tessera encode")
        self.meta = validate(CodesMeta, read_json(folder / META, "encode again"), where=str(folder / META))
        files = [folder / shard_name(i) for i in range(self.meta.shards)]
        try:
            self._codes = MappedRows(files, "codes")
            self._maps = None if self.meta.segmentation is None else MappedRows(files, "segmentation")
            items = np.arange(len(self._codes))
            if "items" in _names(files[0]):
                items = np.concatenate([*MappedRows(files, "items").chunks(), np.empty(0, np.int64)])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder} is not complete ({error}); run tessera encode again") from None
        lines = [row for _, row in read_json_lines(folder / CAPTIONS, "encode again")]
        if len(lines) != self.meta.rows or len(items) != len(self) or (len(items) and int(items.max()) >= len(lines)):
            raise InputError(f"{folder} has {len(self)} rows of codes and {len(lines)} of captions; encode again")
        self.items = [lines[item] for item in items.tolist()]
        self.captions = [tuple(row["text"]) for row in self.items]
        self.weights = [float(row["weight"]) for row in self.items]
        self.labels = [int(row["label"]) for row in self.items] if self.meta.class_names else []

    @property
    def identity(self) -> str:
        """Changes with anything a prior could learn from: codes, captions, weights, labels, maps, and their order."""
        digest = sha256()
        for codes in self._codes.chunks():
            digest.update(np.ascontiguousarray(rearrange(codes, "b q h w -> b (h w q)")).tobytes())
        for maps in () if self._maps is None else self._maps.chunks():
            digest.update(maps.tobytes())
        digest.update(repr((self.captions, self.weights, self.labels, self.meta.class_names)).encode())
        return f"{len(self)} rows (fingerprint {digest.hexdigest()[:16]})"

    def read(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """The codes of these rows, (B, T) int64."""
        return flatten_codes(torch.from_numpy(self._codes.read(rows)).long())

    def read_maps(self, rows: Sequence[int] | np.ndarray) -> Tensor | None:
        """The codes of their segmentation maps, (B, Q, h, w) int64; None where they have none."""
        return None if self._maps is None else torch.from_numpy(self._maps.read(rows)).long()

    def __len__(self) -> int:
        return len(self._codes)

    def batch(self, indices: Sequence[int] | np.ndarray, captions: list[str]) -> CodesBatch:
        """The rows at `indices`, with these captions."""
        labels = [self.labels[index] for index in indices] if self.labels else []
        return CodesBatch(self.read(indices), captions, labels, self.read_maps(indices))


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


def _names(file: Path) -> set[str]:
    with safe_open(file, "pt") as opened:
        return set(opened.keys())
