"""Images with captions as tensors, read at random. What a folder says: folder.py; the order of training: order.py.

Unreadable images are skipped, counted once and named; another takes the place of one only where a process would be left
with an empty batch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tessera.config import Config
from tessera.data.folder import describe_left_out, read_folder
from tessera.data.order import Order
from tessera.errors import InputError
from tessera.images import fit, open_image, to_tensor
from tessera.weights.folder import fingerprint

UNREADABLE_SHARE, UNREADABLE_FLOOR = 0.05, 3  # of the files of a folder that may be broken, and how many in any case


class DataConfig(Config):
    folder: Path
    split: str | None = "train"  # None takes every image
    validation_split: str | None = None  # images for figures and samples during training; None takes training ones


class Batch(NamedTuple):
    images: Tensor  # (B, 3, H, W) float32 in [-1, 1]
    captions: list[str]  # one of each image's captions, drawn anew every time
    skipped: list[str]  # one sentence for each unreadable image that should have been here


class Source(Protocol):
    """Random access to images with captions: what every kind of data gives to training, encoding and evaluation."""

    @property
    def items(self) -> Sequence[Any]: ...

    @property
    def weights(self) -> Sequence[float]:
        """How often each item is shown, relative to the others."""

    @property
    def identity(self) -> str:
        """Changes when anything changes that a model could learn from; a run resumes with the same alone."""

    def read(self, index: int) -> Tensor:
        """(3, H, W) float32 in [-1, 1]. Raises InputError when the item is broken."""


class ImageFolder:
    """The images of `folder`, of one `split` if given, scaled and cut to `size` x `size`."""

    def __init__(self, folder: str | Path, size: int, split: str | None = None, need_captions: bool = False) -> None:
        self.folder, self.size, self.split = Path(folder), size, split
        self.items, left_out, without_text = read_folder(self.folder, split)
        self.left_out = describe_left_out(left_out)
        if need_captions and not any(item.captions for item in self.items):
            raise InputError(f"{folder} has pictures but no captions; {without_text}")
        if need_captions:
            self.items = [item for item in self.items if item.captions]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def identity(self) -> str:
        """Changes with the images (their names and sizes in bytes), their order, captions, weights and labels."""
        parts = []
        for item in self.items:
            size = item.path.stat().st_size if item.path.is_file() else -1
            name = item.path.relative_to(self.folder).as_posix()
            parts.append(repr((name, size, item.captions, item.weight, item.label)))
        return f"{len(parts)} pictures (fingerprint {fingerprint(*parts)})"

    @property
    def weights(self) -> list[float]:
        return [item.weight for item in self.items]

    def read(self, index: int) -> Tensor:
        """(3, H, W) float32 in [-1, 1]. Raises InputError when the file is broken."""
        return to_tensor(fit(open_image(self.items[index].path), self.size))

    def readable(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, list[int], list[str]]:
        """The images at `indices` that can be read, (n, 3, H, W), their n places in `indices`, and a sentence for
        each of the others."""
        images, places, skipped = [], [], []
        for place, index in enumerate(indices):
            try:
                images.append(self.read(int(index)))
                places.append(place)
            except InputError as error:
                skipped.append(str(error))
        stacked = torch.stack(images) if images else torch.empty(0, 3, self.size, self.size)
        return stacked, places, skipped

    def batch(self, indices: np.ndarray, random: np.random.Generator) -> Batch:
        """The images at `indices`, each with one caption drawn by `random`.

        Where none of them can be read, the next one in the folder that can be takes the place of the first: a model
        cannot be trained on an empty batch, and other processes wait for this one.
        """
        draws = random.random(len(indices))
        images, places, skipped = self.readable(indices)
        if not places and len(indices):
            index, more = self._next_readable(int(indices[0]))
            indices, places, skipped = np.array([index]), [0], skipped + more
            images = self.read(index).unsqueeze(0)
        captions = []
        for place in places:
            choices = self.items[int(indices[place])].captions or ("",)
            captions.append(choices[int(draws[place] * len(choices))])
        return Batch(images, captions, skipped)

    def _next_readable(self, index: int) -> tuple[int, list[str]]:
        skipped: list[str] = []
        for step in range(1, len(self)):
            _, places, more = self.readable([(index + step) % len(self)])
            skipped += more
            if places:
                return (index + step) % len(self), skipped
        raise InputError(f"{self.folder}: none of its {len(self)} pictures can be read; the last: {skipped[-1]}")


def open_images(config: DataConfig, size: int, *, need_captions: bool = False, validation: bool = False) -> ImageFolder:
    """The images that a recipe's `data` names, `size` x `size`; for figures and samples those of its
    `validation_split`, where it has one. Raises InputError for folders without images, or without captions that are
    needed."""
    split = (config.validation_split or config.split) if validation else config.split
    return ImageFolder(config.folder, size, split, need_captions)


class Unreadable:
    """The images of a folder that could not be read, each counted once."""

    def __init__(self, total: int) -> None:
        self.total, self.sentences = total, dict[str, None]()

    def add(self, skipped: Sequence[str]) -> list[str]:
        """Counts them; returns those that are new. Raises InputError when they are too many of all."""
        new = [sentence for sentence in dict.fromkeys(skipped) if sentence not in self.sentences]
        self.sentences |= dict.fromkeys(new)
        if not new:
            return []
        if len(self.sentences) > max(UNREADABLE_FLOOR, UNREADABLE_SHARE * self.total):
            raise InputError(
                f"{len(self.sentences)} of {self.total} pictures could not be read, too many; the last: {new[-1]}; "
                "see them with 'tessera data check' and mend or remove them"
            )
        if len(self.sentences) >= self.total:
            raise InputError(f"none of {self.total} pictures can be read; the last: {[*self.sentences][-1]}")
        return new


class Steps(Dataset[Batch]):
    """`steps[i]` is the batch of training step i: what a DataLoader hands to its workers."""

    def __init__(self, source: ImageFolder, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.source, self.seed, self.rank, self.world = source, seed, rank, world
        self.order = Order(source.weights, batch_size, seed)

    def __getitem__(self, step: int) -> Batch:
        indices = self.order.batch(step)[self.rank :: self.world]
        return self.source.batch(indices, np.random.default_rng((self.seed, step, self.rank)))
