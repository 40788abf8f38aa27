"""Out of memory, a draw is taken in halves: since an image depends on no other, they are the same images."""

import gc
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Result = TypeVar("Result", bound=tuple)  # a NamedTuple of tensors, one row an image


def draw_in_parts(draw: Callable[[slice, Sequence[int]], Result], prefixes: int, seeds: Sequence[int]) -> Result:
    """What `draw` gives for all prefixes and seeds, or for one half after the other where that does not fit in memory.

    `draw(which, seeds)` draws the prefixes `which` with len(seeds) / len(which) seeds each, in a row. A line on stderr
    says when parts were needed; out of memory with a single image it raises what `draw` raised.
    """
    return _in_parts(draw, slice(0, prefixes), seeds)


def _in_parts(draw: Callable[[slice, Sequence[int]], Result], which: slice, seeds: Sequence[int]) -> Result:
    try:
        return draw(which, seeds)
    except (MemoryError, RuntimeError) as error:
        if len(seeds) == 1 or not is_out_of_memory(error):
            raise
    make_room()
    count = which.stop - which.start
    half = count // 2 or len(seeds) // 2  # of the prefixes, or of the seeds of the only one
    cut = half * len(seeds) // count if count > 1 else half
    print(f"{len(seeds)} images at once do not fit in memory; drawing {cut} and {len(seeds) - cut}", file=sys.stderr)
    middle = which.start + half
    halves = (slice(which.start, middle), slice(middle, which.stop)) if count > 1 else (which, which)
    parts = [_in_parts(draw, *half) for half in zip(halves, (seeds[:cut], seeds[cut:]), strict=True)]
    return joined(parts)


def joined(parts: Sequence[Result]) -> Result:
    """The rows of all parts, in their order."""
    return type(parts[0])(*map(torch.cat, zip(*parts, strict=True)))


def make_room() -> None:
    """After a draw that did not fit; outside of `except`, where the error holds on to what the draw had allocated."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """torch has an exception for it on a GPU, and on a CPU a RuntimeError like any other."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
