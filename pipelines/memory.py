"""How many candidates are sampled at once, and whether all of them fit in memory."""

from collections.abc import Iterator, Sequence

import torch

from pipelines.bundle import Bundle
from pipelines.request import Request
from stage2_prior import Sampling
from tessera.errors import InputError
from tessera.hardware import free_memory

MOST_ROWS = 64  # candidates sampled at once unless told otherwise; more do not get faster on a CPU
CPU = torch.device("cpu")


def batch_size(request: Request, bundle: Bundle) -> int:
    """How many candidates to sample at once. Raises InputError when those of one prompt do not fit in memory."""
    prompts, candidates, device = len(request.prompts), len(request.candidate_seeds), bundle.device
    assert request.sampling is not None
    row, images = row_bytes(bundle, request.sampling), candidates * image_bytes(bundle)  # images of one prompt
    wanted = min(request.batch_size or MOST_ROWS, prompts * candidates)
    least = row * (wanted if request.batch_size else 1)
    check_memory(images, candidates, prompts)
    check_memory(least + (device.type == "cpu") * images, candidates, prompts, device)
    return wanted if request.batch_size else max(1, min(wanted, int(free_memory(device) / 2 // row)))


def check_memory(need: int, candidates: int, prompts: int, place: torch.device = CPU) -> None:
    """Raises InputError unless `need` bytes are free."""
    free = free_memory(place)
    if need > free:
        raise InputError(
            f"{candidates:,} candidates for {prompts:,} prompts need about {need / 1e9:,.1f} GB of memory, and "
            f"{free / 1e9:,.1f} GB are free; ask for fewer"
        )


def row_bytes(bundle: Bundle, sampling: Sampling) -> int:
    """Roughly what sampling and decoding one more candidate takes: keys and values, logits, pixels."""
    numbers = bundle.prior.cache_numbers() + 8 * bundle.prior.codebook_size
    guided = 2 if sampling.guided else 1
    return 4 * (guided * numbers + 3 * bundle.image_tokenizer.image_size**2 * 8)


def image_bytes(bundle: Bundle) -> int:
    """A candidate as it is kept: 8-bit pixels, int64 codes, and what Python adds."""
    return 3 * bundle.image_tokenizer.image_size**2 + 8 * bundle.prior.length + 1000


def batches(
    prompts: int, seeds: Sequence[int], rows: int, whole: bool = False
) -> Iterator[tuple[int, int, Sequence[int]]]:
    """(first prompt, last prompt + 1, seeds) of each batch of at most `rows` candidates, prompt after prompt.

    Several prompts with all of their seeds where that fits, else one prompt with some of them, or all if `whole`.
    """
    if whole or len(seeds) <= rows:
        several = max(1, rows // len(seeds))
        for first in range(0, prompts, several):
            yield first, min(first + several, prompts), seeds
    else:
        for prompt in range(prompts):
            for start in range(0, len(seeds), rows):
                yield prompt, prompt + 1, seeds[start : start + rows]
