"""Ancestral sampling with a cache: the prefix is computed once for all candidates, guidance is more rows of the batch.

An image depends on its prefix, its seed and the settings alone: every row has its own random generator, so candidate i
is the same in a batch of 1 or 64.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.errors import InputError
from stage2_prior.base import Prior
from stage2_prior.sampling.engine import engine_for
from stage2_prior.sampling.noise import draw_with, words_of
from stage2_prior.sampling.settings import Sampling, filter_logits, guide


@torch.inference_mode()
def sample(
    prior: Prior,
    prefix: Tensor,
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Draws one image's codes for each seed: (N, T) int64 on the prior's device.

    `prefix` (R, P): each row serves N / R seeds in a row; one row serves all. `progress(t)` is called after code t.
    Raises InputError when N is not a multiple of R.
    """
    sampling = sampling or Sampling()
    if not seeds or len(seeds) % len(prefix):
        raise InputError(f"the number of seeds must be a multiple of the {len(prefix)} prefixes, got {len(seeds)}")
    rows = torch.arange(len(prefix), device=prefix.device).repeat_interleave(len(seeds) // len(prefix))
    guided = sampling.guidance_scale != 1
    if guided:
        prefix = torch.cat([prefix, prior.null_prefix(1).to(prefix.device)])
        rows = torch.cat([rows, torch.full_like(rows, len(prefix) - 1)])

    engine = engine_for(prior)
    logits, cache = engine.prefill(prefix, prior.length - 1)
    logits, cache = logits[rows], cache.repeat(rows)  # (N, K), or (2N, K) with the unconditional rows below
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    codes = torch.empty(len(seeds), prior.length, dtype=torch.int64, device=prefix.device)
    for position in range(prior.length):
        if position > 0:
            drawn = codes[:, position - 1]
            logits = engine.step(torch.cat([drawn, drawn]) if guided else drawn, cache)
        logits = logits.float()
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = guide(conditional, unconditional, sampling.guidance_scale)
        codes[:, position] = draw(filter_logits(logits, sampling), generators)
        if progress is not None:
            progress(position)
    return codes


def draw(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One code a row in proportion to exp(logits), (N, K) -> (N,) int64, each row with its own generator."""
    return draw_with(logits, words_of(generators))
