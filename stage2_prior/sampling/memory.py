"""Out of memory, images are sampled in halves: since an image depends on no other, they are the same images."""

import gc
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result", bound=tuple)  # a NamedTuple of tensors with one row an image or a prefix, or of such tuples

logger = logging.getLogger("stage2_prior")


def in_halves(
    sample: Callable[[slice, Sequence[int], int], Result], prefixes: slice, seeds: Sequence[int], batch_size: int
) -> Result:
    """`sample(prefixes, seeds, batch_size)`, in smaller pieces where that does not fit in memory.

    `sample` gives every prefix its len(seeds) / len(prefixes) seeds in a row, at most `batch_size` at once. Of several
    prefixes one half is sampled after the other; of a single one half as many images at once. A warning is logged for
    every cut; out of memory with one image at once, the error of `sample` is raised.
    """
    images, count = min(len(seeds), batch_size), prefixes.stop - prefixes.start
    try:
        return sample(prefixes, seeds, batch_size)
    except (MemoryError, RuntimeError) as error:
        if images == 1 or not is_out_of_memory(error):
            raise
    # Outside of `except`, because the error holds on to what was allocated.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    problem = f"{images} images at once do not fit in memory"
    if count == 1:
        logger.warning("%s; sampling %d at once", problem, images // 2)
        return in_halves(sample, prefixes, seeds, images // 2)
    middle, cut = prefixes.start + count // 2, count // 2 * (len(seeds) // count)
    logger.warning("%s; sampling %d and %d", problem, cut, len(seeds) - cut)
    halves = (slice(prefixes.start, middle), seeds[:cut]), (slice(middle, prefixes.stop), seeds[cut:])
    return joined([in_halves(sample, *half, batch_size) for half in halves])


def joined(parts: Sequence[Result]) -> Result:
    """The rows of all parts, in their order."""
    columns = zip(*parts, strict=True)
    return type(parts[0])(*(torch.cat(c) if isinstance(c[0], Tensor) else joined(c) for c in columns))


def is_out_of_memory(error: BaseException) -> bool:
    """torch has an exception for it on a GPU, and on a CPU a RuntimeError like any other."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
