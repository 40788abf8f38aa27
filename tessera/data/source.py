"""Pictures with captions as tensors, and the order in which training sees them. What a folder says: folder.py.

The order is a pure function of (seed, step), so training resumes at any step and any number of processes sees the
same global batches. Unreadable pictures are skipped, counted once and named; another takes the place of one only where
a process would be left with an empty batch.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tessera.config import Config
from tessera.data.folder import describe_left_out, read_folder
from tessera.errors import InputError
from tessera.images import fit, open_image, to_tensor
from tessera.weights.folder import fingerprint

UNREADABLE_SHARE, UNREADABLE_FLOOR = 0.05, 3  # of the files of a folder that may be broken, and how many in any case
LOADER_PATIENCE = 600  # seconds for one batch
B = TypeVar("B")


class DataConfig(Config):
    folder: Path
    split: str | None = "train"  # None takes every picture
    validation_split: str | None = None  # pictures for figures and samples during training; None takes training ones


class Batch(NamedTuple):
    images: Tensor  # (B, 3, H, W) float32 in [-1, 1]
    captions: list[str]  # one of each picture's captions, drawn anew every time
    skipped: list[str]  # one sentence for each unreadable picture that should have been here


class ImageFolder:
    """The pictures of `folder`, of one `split` if given, scaled and cut to `size` x `size`."""

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
        """Changes with the pictures (their names and sizes in bytes), their order, captions, weights and labels."""
        parts = []
        for item in self.items:
            size = item.path.stat().st_size if item.path.is_file() else -1
            name = item.path.relative_to(self.folder).as_posix()
            parts.append(repr((name, size, item.captions, item.weight, item.label)))
        return f"{len(parts)} pictures (fingerprint {fingerprint(*parts)})"

    def image(self, index: int) -> Tensor:
        """(3, H, W) float32 in [-1, 1]. Raises InputError when the file is broken."""
        return to_tensor(fit(open_image(self.items[index].path), self.size))

    def readable(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, list[int], list[str]]:
        """The pictures at `indices` that can be read, (n, 3, H, W), their n places in `indices`, and a sentence for
        each of the others."""
        images, places, skipped = [], [], []
        for place, index in enumerate(indices):
            try:
                images.append(self.image(int(index)))
                places.append(place)
            except InputError as error:
                skipped.append(str(error))
        stacked = torch.stack(images) if images else torch.empty(0, 3, self.size, self.size)
        return stacked, places, skipped

    def batch(self, indices: np.ndarray, random: np.random.Generator) -> Batch:
        """The pictures at `indices`, each with one caption drawn by `random`.

        Where none of them can be read, the next one in the folder that can be takes the place of the first: a model
        cannot be trained on an empty batch, and other processes wait for this one.
        """
        draws = random.random(len(indices))
        images, places, skipped = self.readable(indices)
        if not places and len(indices):
            index, more = self._next_readable(int(indices[0]))
            indices, places, skipped = np.array([index]), [0], skipped + more
            images = self.image(index).unsqueeze(0)
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


class Unreadable:
    """The pictures of a folder that could not be read, each counted once."""

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


def step_loader(steps: Dataset[B], first: int, last: int, num_workers: int = 0) -> Iterator[B]:
    """Batches of the steps first..last-1, in order; workers prepare the coming ones meanwhile.

    Raises InputError where workers cannot hand batches over, for want of shared memory or because one died.
    """
    if num_workers and first < last:
        check_shared_memory(steps[first], num_workers)
    loader: DataLoader[B] = DataLoader(
        steps,
        batch_size=None,
        sampler=range(first, last),
        num_workers=num_workers,
        generator=torch.Generator(),
        timeout=LOADER_PATIENCE if num_workers else 0,
    )
    batches = iter(loader)
    for _ in range(first, last):
        failure = ""
        try:
            batch = next(batches)
        except InputError as error:  # from a worker it comes with that worker's traceback in front
            failure = str(error).rpartition("InputError: ")[2].strip()
        except (RuntimeError, OSError, EOFError) as error:  # the last two of a connection to a process that is gone
            if not num_workers or (isinstance(error, RuntimeError) and "DataLoader" not in str(error)):
                raise
            failure = (
                f"a loader process died or gave no batch within {LOADER_PATIENCE} s, for want of memory or shared "
                "memory (/dev/shm) perhaps; use fewer run.num_workers, or 0"
            )
        if failure:
            del batches  # with its workers: torch raises in whatever runs later when it hears of one that died
            raise InputError(failure)
        yield batch


def check_shared_memory(batch: object, num_workers: int, folder: str = "/dev/shm") -> None:
    """Raises InputError unless shared memory has room for the batches that `num_workers` prepare at once.

    torch's loader waits for ever when a worker finds none.
    """
    if not sys.platform.startswith("linux") or not Path(folder).is_dir():
        return
    fields = batch if isinstance(batch, tuple) else (batch,)
    size = sum(field.numel() * field.element_size() for field in fields if isinstance(field, Tensor))
    needed = size * (2 * num_workers + 1)  # a worker prepares two
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise InputError(
            f"{folder}, the memory that loader processes share with training, cannot be written ({error.strerror}); "
            "mount it writable or use run.num_workers=0"
        ) from None
    if free < needed:
        raise InputError(
            f"run.num_workers={num_workers} needs {needed / 2**20:,.1f} MiB of shared memory for batches, {folder} has "
            f"{free / 2**20:,.1f} free; give more (docker run --shm-size=2g) or use run.num_workers=0"
        )
