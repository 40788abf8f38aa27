"""Pictures with captions from disk, and the order in which training sees them.

Two layouts are read: Hugging Face's imagefolder (`metadata.jsonl` or `metadata.csv` beside the pictures, with
`file_name`, `text` and optionally `split`, `weight`, `label`, the name or number of a class, and `segmentation`, the
file of a segmentation map), and sidecar captions (`a.jpg` with `a.txt`, a caption a line).

The order is a pure function of (seed, step), so training resumes at any step and any number of processes sees the
same global batches. Unreadable pictures are skipped, counted and named, never replaced by others.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.config import Config
from common.errors import InputError, nearest
from common.images import fit, open_image, to_tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
MOST_CLASSES = 100_000


class DataConfig(Config):
    folder: Path
    split: str | None = "train"  # None takes every picture
    validation_split: str | None = None  # pictures for figures and samples during training; None takes training ones


class Item(NamedTuple):
    path: Path
    captions: tuple[str, ...]  # equally true descriptions; may be empty
    weight: float  # how often the picture is drawn, relative to the others
    kind: str  # free label from the metadata, "" when there is none
    label: str = ""  # name or number of its class, "" when it has none
    segmentation: Path | None = None  # picture of its segmentation map


class Batch(NamedTuple):
    images: Tensor  # (B, 3, H, W) float32 in [-1, 1]
    captions: list[str]  # one of each picture's captions, drawn anew every time
    skipped: list[str]  # one sentence for each unreadable picture that should have been here


class ImageFolder:
    """The pictures of `folder`, of one `split` if given, scaled and cut to `size` x `size`."""

    def __init__(self, folder: str | Path, size: int, split: str | None = None, need_captions: bool = False) -> None:
        self.folder, self.size = Path(folder), size
        self.items = read_items(self.folder, split)
        if need_captions and not any(item.captions for item in self.items):
            raise InputError(f"{folder} has pictures but no captions; add metadata.jsonl or .txt files beside them")
        if need_captions:
            self.items = [item for item in self.items if item.captions]

    def __len__(self) -> int:
        return len(self.items)

    def image(self, index: int) -> Tensor:
        """(3, H, W) float32 in [-1, 1]. Raises InputError when the file is broken."""
        return to_tensor(fit(open_image(self.items[index].path), self.size))

    def batch(self, indices: np.ndarray, random: np.random.Generator) -> Batch:
        """The pictures at `indices`, each with one caption drawn by `random`."""
        images, captions, skipped = [], [], []
        draws = random.random(len(indices))
        for index, draw in zip(indices, draws, strict=True):
            try:
                images.append(self.image(index))
            except InputError as error:
                skipped.append(str(error))
                continue
            choices = self.items[index].captions or ("",)
            captions.append(choices[int(draw * len(choices))])
        stacked = torch.stack(images) if images else torch.empty(0, 3, self.size, self.size)
        return Batch(stacked, captions, skipped)


def read_items(folder: Path, split: str | None = None) -> list[Item]:
    """Every picture of `folder` (and of `split`, if given). Raises InputError when there is none, or no such split."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give a folder of pictures")
    if (folder / "metadata.jsonl").is_file():
        rows = list(_jsonl_rows(folder / "metadata.jsonl"))
    elif (folder / "metadata.csv").is_file():
        table = csv.DictReader(io.StringIO(read_text(folder / "metadata.csv"), newline=""))
        rows = [(f"row {number}", row) for number, row in enumerate(table, 1)]
    else:
        rows = [("", row) for row in _sidecar_rows(folder)]
    if not rows:
        raise InputError(f"{folder} has no pictures ({', '.join(SUFFIXES)}) and no metadata.jsonl")
    if split is not None:
        splits = sorted({str(row.get("split", "train")) for _, row in rows})
        rows = [(where, row) for where, row in rows if row.get("split", "train") == split]
        if not rows:
            raise InputError(f"{folder} has no split '{split}'{nearest(split, splits)}")
    return [_item(folder, where, row) for where, row in rows]


def _item(folder: Path, where: str, row: dict[str, Any]) -> Item:
    name, text = row.get("file_name"), row.get("text", [])
    if not isinstance(name, str) or not name:
        raise InputError(f"{folder}/metadata, {where}: 'file_name' is missing")
    path = _inside(folder, where, "file_name", name)
    captions = [text] if isinstance(text, str) else text
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise InputError(f"{folder}/metadata, {where}: 'text' must be a caption or a list of captions")
    try:
        weight = float(row.get("weight") or 1.0)
    except (TypeError, ValueError):
        weight = -1.0
    if not 0 < weight < float("inf"):
        raise InputError(f"{folder}/metadata, {where}: 'weight' must be a number above 0, got {row['weight']!r}")
    label, map_name = row.get("label"), row.get("segmentation")
    label = "" if label is None else label
    if not isinstance(label, str | int) or isinstance(label, bool) or isinstance(label, int) and label < 0:
        raise InputError(f"{folder}/metadata, {where}: 'label' must be a name or a number from 0 on, got {label!r:.40}")
    if not isinstance(map_name, str | None):
        raise InputError(f"{folder}/metadata, {where}: 'segmentation' must be the file of a map, got {map_name!r:.40}")
    return Item(
        path,
        tuple(caption for caption in captions if caption.strip()),
        weight,
        str(row.get("kind", "")),
        str(label).strip(),
        _inside(folder, where, "segmentation", map_name) if map_name else None,
    )


def _inside(folder: Path, where: str, field: str, name: str) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{folder}/metadata, {where}: '{field}' {name} leads out of the folder")
    return path


def class_names(items: Sequence[Item]) -> tuple[str, ...]:
    """The names of all classes in the order of their numbers: 0, 1, ... where labels are numbers, else the alphabet's.

    Empty where nothing is labelled. Raises InputError when only some of the pictures are.
    """
    labels = {item.label for item in items}
    if "" in labels:
        if len(labels) > 1:
            bare = next(item for item in items if not item.label)
            raise InputError(f"{bare.path} has no label and others have; label all pictures or none")
        return ()
    if not all(label.isdecimal() and str(int(label)) == label for label in labels):
        return tuple(sorted(labels))
    highest = max(int(label) for label in labels)
    if highest >= MOST_CLASSES:
        raise InputError(f"the label {highest} is too high, classes are numbered from 0 on; number them without gaps")
    return tuple(str(number) for number in range(highest + 1))


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not valid JSON ({error.msg}); mend or remove the line") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: must be an object with 'file_name' and 'text'")
        yield f"line {number}", row


def _sidecar_rows(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            sidecar = path.with_suffix(".txt")
            text = read_text(sidecar).splitlines() if sidecar.is_file() else []
            yield {"file_name": str(path.relative_to(folder)), "text": text}


def read_text(path: Path) -> str:
    """The file's text. Raises InputError when it is not UTF-8 or cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


class Order:
    """Which items make up the batch of a step: a pure function of (seed, step).

    Every epoch is a systematic resampling of the weights (an item of k times the mean weight comes floor(k) or ceil(k)
    times; with equal weights each comes exactly once) in random order.
    """

    def __init__(self, weights: list[float], batch_size: int, seed: int) -> None:
        shares = np.asarray(weights, dtype=np.float64)
        self._cumulative = np.cumsum(shares / shares.sum() * len(shares))
        self.batch_size, self.seed = batch_size, seed
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def batch(self, step: int) -> np.ndarray:
        """(batch_size,) int64 item numbers of `step`, counted from 0."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, len(self._cumulative))
        return np.array([self._permutation(int(e))[o] for e, o in zip(epochs, offsets, strict=True)], dtype=np.int64)

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._epoch[0] != epoch:
            random = np.random.default_rng((self.seed, epoch))
            points = np.arange(len(self._cumulative)) + random.random()
            items = np.searchsorted(self._cumulative, points).clip(max=len(self._cumulative) - 1)
            self._epoch = (epoch, random.permutation(items))
        return self._epoch[1]


class Steps(Dataset[Batch]):
    """`steps[i]` is the batch of training step i: what a DataLoader hands to its workers."""

    def __init__(self, source: ImageFolder, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.source, self.seed, self.rank, self.world = source, seed, rank, world
        self.order = Order([item.weight for item in source.items], batch_size, seed)

    def __getitem__(self, step: int) -> Batch:
        indices = self.order.batch(step)[self.rank :: self.world]
        return self.source.batch(indices, np.random.default_rng((self.seed, step, self.rank)))


def step_loader(steps: Dataset[Any], first: int, last: int, num_workers: int = 0) -> DataLoader[Any]:
    """Batches of the steps first..last-1, in order; workers prepare the coming ones meanwhile."""
    return DataLoader(
        steps, batch_size=None, sampler=range(first, last), num_workers=num_workers, generator=torch.Generator()
    )
