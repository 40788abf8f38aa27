"""The batches of steps, prepared beside training by loader processes where it wants them."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tessera.errors import InputError

LOADER_PATIENCE = 600  # seconds for one batch
B = TypeVar("B")


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
