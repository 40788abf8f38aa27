"""The laws that every prior keeps (DESIGN, section 3), for the tests of each."""

from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior import Sampling, sample
from stage2_prior.base import Cache, Prior
from stage2_prior.sampling.sample import draw
from stage2_prior.sampling.settings import filter_logits, guide

GREEDY = Sampling(top_k=1)


@torch.no_grad()
def check_laws(prior: Prior, prefix: Tensor, guided: bool = True) -> None:
    """`prefix` has several rows; `guided` where the prior has something to guide away from."""
    torch.manual_seed(1)
    codes = torch.randint(0, prior.codebook_size, (len(prefix), prior.length))
    check_causality(prior, prefix, codes)
    check_gradients(lambda read: prior(prefix, read), codes, (codes + 1) % prior.codebook_size)
    check_steps(prior, prefix, codes)
    check_cache(prior, prefix)
    for scale in (1.0, 2.5) if guided else (1.0,):
        sampling = Sampling(guidance_scale=scale, temperature=0.9, top_k=prior.codebook_size - 1)
        seeds = [*range(3)] * len(prefix)
        together = sample(prior, prefix, seeds, sampling)
        rows = torch.arange(len(prefix)).repeat_interleave(3)
        assert torch.equal(together, uncached(prior, prefix[rows], seeds, sampling))
        for i, (row, seed) in enumerate(zip(rows.tolist(), seeds, strict=True)):
            assert torch.equal(together[i : i + 1], sample(prior, prefix[row : row + 1], [seed], sampling))


def check_causality(prior: Prior, prefix: Tensor, codes: Tensor) -> None:
    """A code moves the logits after it, and none before."""
    before = prior(prefix, codes)
    assert before.shape == (*codes.shape, prior.codebook_size)
    for j in range(prior.length):
        changed = codes.clone()
        changed[:, j] = (changed[:, j] + 1) % prior.codebook_size
        moved = (prior(prefix, changed) - before).abs().amax(-1) > 0
        assert not moved[:, : j + 1].any()
        assert j == prior.length - 1 or moved[:, j + 1 :].all()


@torch.enable_grad()
def check_gradients(
    forward: Callable[[Tensor], Tensor], codes: Tensor, others: Tensor, order: Sequence[int] | None = None
) -> None:
    """Codes reach the logits of those read after them and no others, by the gradient at their embeddings.

    `forward` is codes (B, T) -> logits (B, T, K), of which those at t foretell code t; `others` differ from the codes
    everywhere; `order` are the places in the order in which they are read. Unlike changing a code for another, a
    gradient shows influence of any size in any direction.
    """
    ids, embedded, logits = _embedded(forward, codes)
    owners = [torch.full(one.shape, -1) for one in ids]  # whose code an embedding is, -1 for none
    for place in range(codes.shape[1]):
        changed = codes.clone()
        changed[:, place] = others[:, place]
        for owner, before, after in zip(owners, ids, _embedded(forward, changed)[0], strict=True):
            owner[before != after] = place
    places = list(range(codes.shape[1]) if order is None else order)
    assert set(places[:-1]) <= {place for owner in owners for place in owner.unique().tolist()}
    for when, place in enumerate(places):
        directions = torch.randn(logits[:, place].shape)
        gradients = torch.autograd.grad(logits[:, place], embedded, directions, retain_graph=True, allow_unused=True)
        reached = set[int]()
        for owner, gradient in zip(owners, gradients, strict=True):
            reached |= set() if gradient is None else set(owner[(gradient != 0).any(-1)].tolist())
        assert reached - {-1} <= set(places[:when])
        assert when == 0 or reached - {-1}


def _embedded(forward: Callable[[Tensor], Tensor], codes: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The ids of all embeddings that the forward pass looks up, what it found, and the logits."""
    ids, embedded, look_up = list[Tensor](), list[Tensor](), F.embedding

    def watched(which: Tensor, *rest: Any) -> Tensor:
        ids.append(which)
        embedded.append(look_up(which, *rest).detach().requires_grad_())
        return embedded[-1]

    with patch("torch.nn.functional.embedding", watched):
        logits = forward(codes)
    return ids, embedded, logits


def check_steps(prior: Prior, prefix: Tensor, codes: Tensor) -> None:
    """Log-probabilities with a cache sum to the teacher-forced ones."""
    forced = prior(prefix, codes).log_softmax(-1).gather(-1, codes.unsqueeze(-1)).sum((1, 2))
    logits, cache = prior.prefill(prefix, prior.length - 1)
    total = torch.zeros(len(codes))
    for t in range(prior.length):
        total += logits.log_softmax(-1).gather(-1, codes[:, t : t + 1])[:, 0]
        if t < prior.length - 1:
            logits = prior.step(codes[:, t], cache)
    torch.testing.assert_close(total, forced, rtol=0, atol=1e-4)


def check_cache(prior: Prior, prefix: Tensor) -> None:
    """The cache of a sequence has as many numbers as the prior says, with or without the last code, which none reads.

    How many images are drawn at once follows from that."""
    least, most = (_numbers(prior.prefill(prefix[:1], length)[1]) for length in (prior.length - 1, prior.length))
    assert least <= prior.cache_numbers() <= most


def _numbers(cache: Cache) -> int:
    def count(part: object) -> int:
        if isinstance(part, Tensor):
            return part.numel() if part.ndim > 2 and part.is_floating_point() else 0
        return sum(map(count, part)) if isinstance(part, list | tuple) else 0

    return sum(map(count, vars(cache).values()))


def uncached(prior: Prior, prefix: Tensor, seeds: list[int], sampling: Sampling) -> Tensor:
    """Sampling by the whole forward pass for every code; row i of `prefix` goes with `seeds[i]`."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    codes = torch.zeros(len(seeds), prior.length, dtype=torch.int64)
    for t in range(prior.length):
        logits = prior(prefix, codes)[:, t]
        if sampling.guidance_scale != 1:
            nulls = prior.unconditional(prefix)
            nulls = nulls.expand(len(prefix), *nulls.shape[1:])
            logits = guide(logits, prior(nulls, codes)[:, t], sampling.guidance_scale)
        codes[:, t] = draw(filter_logits(logits, sampling), generators)
    return codes
