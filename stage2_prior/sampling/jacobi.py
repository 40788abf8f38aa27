"""Speculative Jacobi decoding (Teng et al. 2024): several positions a step, each sampled given a guess of those before.

A step reads a window of guessed positions at once and samples every one of them again. The first is right, because all
before it are known; the next is right when the guess before it was, and so on up to the first wrong guess. What was
sampled behind it are the next step's guesses. Where a step's time goes into reading the weights, a window costs little
more than one position.

Deliberate difference from Teng et al.: there a guess is accepted at random and sampled again if it is not; here the
noise of each code is that of its position in `sample` (the coupling of So et al. 2025), so that with its noise a code
is a function of the codes before it, and decoding a fixed-point iteration as in Song et al. 2021 for greedy decoding. A
guess is accepted when it is what `sample` samples: the same seed gives the same image, code for code, not only the same
distribution; and guesses settle as soon as the noise outweighs what the wrong codes before them change.

Letters: N sequences, S positions of a window, Q codebooks, K codebook size, T = positions · Q codes an image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stage2_prior.base import Prior
from stage2_prior.sampling.cpu import CPUCache, CPUEngine
from stage2_prior.sampling.engine import Engine
from stage2_prior.sampling.noise import draw_with, words_of
from stage2_prior.sampling.sample import CodesSampled, sample
from stage2_prior.sampling.selection import make_engine
from stage2_prior.sampling.settings import Sampling, filter_logits, guidance_at, guide
from tessera.errors import InputError


class Speculated(NamedTuple):
    codes: Tensor  # (N, T) int64, what `sample` gives
    steps: Tensor  # (N,) int64, how many times the trunk ran for each image; `sample` takes one a position


@torch.inference_mode()
def sample_speculatively(
    prior: Prior,
    prefix: Tensor,
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    window: int = 4,
    progress: CodesSampled | None = None,
    *,
    engine: Engine | None = None,
) -> Speculated:
    """What `sample` gives for one prefix (1, P) and each seed, in fewer steps; for few seeds.

    `progress(n)` is called when n more codes are known; `engine` as of `sample`. With another engine than the CPU's the
    prior is sampled plainly, one position a step. Raises InputError for several prefixes, no seeds, a window below 1.
    """
    if len(prefix) != 1 or not seeds:
        raise InputError(f"speculation takes one prefix and some seeds, got {len(prefix)} and {len(seeds)}")
    if window < 1:
        raise InputError(f"window must be at least 1, got {window}")
    engine = engine or make_engine(prior)
    engine.check(prior)
    if not isinstance(engine, CPUEngine):
        codes = sample(prior, prefix, seeds, sampling, progress, engine=engine)
        return Speculated(codes, torch.full((len(seeds),), prior.length // prior.code_shape[0]))
    return _Decoding(prior, engine, prefix, seeds, sampling or Sampling(), window).run(progress)


class _Decoding:
    def __init__(
        self, prior: Prior, engine: CPUEngine, prefix: Tensor, seeds: Sequence[int], sampling: Sampling, window: int
    ) -> None:
        self.engine, self.sampling, self.window = engine, sampling, window
        self.guided = sampling.guided
        count, self.num_codebooks = len(seeds), prior.code_shape[0]
        self.length = prior.length // self.num_codebooks  # positions
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        # In the order of `sample`, (N, T, 2).
        words = torch.stack([words_of(generators) for _ in range(prior.length)], 1)
        # Windows reach beyond the last position: the words there are 0, the codes are thrown away.
        shape = count, self.length + window + 1, self.num_codebooks
        self.words = torch.zeros(*shape, 2, dtype=torch.int32)
        self.words[:, : self.length] = words.view(count, self.length, self.num_codebooks, 2)
        scales = [guidance_at(sampling, min(t, prior.length - 1), prior.length) for t in range(shape[1] * shape[2])]
        self.scales = torch.tensor(scales).view(shape[1:])  # of guidance, (positions, Q)
        self.codes = torch.zeros(shape, dtype=torch.int64)  # right up to position `known`, guesses behind
        self.steps = torch.ones(count, dtype=torch.int64)

        if self.guided:
            prefix = torch.cat([prefix, prior.unconditional(prefix)])
        rows = torch.arange(len(prefix)).repeat_interleave(count)  # conditional rows first
        logits, cache = engine.prefill(prefix, prior.length + window * self.num_codebooks)
        self.cache: CPUCache = cache.repeat(rows)
        first = self._draw(
            self.cache.state.unsqueeze(1),
            logits[rows].unsqueeze(1),
            self.words[:, :1],
            self.scales[None, :1].expand(count, -1, -1),
        )  # (N, 1, Q)
        self.codes[:] = first  # guesses to start from: the first position's codes, everywhere
        self.known = torch.ones(count, dtype=torch.int64)  # positions

    def run(self, progress: CodesSampled | None) -> Speculated:
        reported, left = 0, torch.arange(len(self.codes))  # the unfinished images, in the order of the cache's rows
        while True:
            unfinished = self.known[left] < self.length
            if not unfinished.all():
                left = left[unfinished]
                kept = unfinished.nonzero().flatten()
                self.cache = self.cache.repeat(torch.cat([kept, kept + len(unfinished)]) if self.guided else kept)
            done = int(self.known.clamp_max(self.length).sum()) * self.num_codebooks
            if progress is not None and done > reported:
                progress(done - reported)
            reported = done
            if not len(left):
                return Speculated(self.codes[:, : self.length].flatten(1), self.steps)
            self._step(left)

    def _step(self, left: Tensor) -> None:
        """Reads the last known position of each image and the guesses behind it, and samples what follows them."""
        most = int((self.length - self.known[left]).max())
        ahead = torch.arange(min(self.window, most))  # (S,)
        read = (self.known[left] - 1)[:, None] + ahead  # (n, S)
        images = left[:, None]
        codes = self.codes[images, read].flatten(1)  # (n, S·Q)
        self.cache.length = (self.known[left] - 1).to(torch.int32).repeat(2 if self.guided else 1)
        states, logits = self.engine.head_logits(
            self.engine.advance(torch.cat([codes, codes]) if self.guided else codes, self.cache)
        )
        sampled = self._draw(states, logits, self.words[images, read + 1], self.scales[read + 1])  # (n, S, Q)
        right = (sampled[:, :-1] == self.codes[images, read[:, 1:]]).all(-1)  # guesses that came out again
        accepted = 1 + right.cumprod(1).sum(1)
        self.codes[images, read + 1] = sampled
        self.known[left] += accepted
        self.steps[left] += 1

    def _draw(self, states: Tensor, logits: Tensor, words: Tensor, scales: Tensor) -> Tensor:
        """States (m, S, E) and first logits (m, S, K), conditional, then unconditional; words and guidance (n, S, Q).

        -> codes (n, S, Q).
        """
        sampled = torch.empty(*words.shape[:2], 0, dtype=torch.int64)
        for q in range(self.num_codebooks):
            if q > 0:
                logits = self.engine.depth_logits(states, torch.cat([sampled, sampled]) if self.guided else sampled)
            flat = logits.flatten(0, 1)
            if self.guided:
                conditional, unconditional = flat.chunk(2)
                flat = guide(conditional, unconditional, scales[..., q].reshape(-1, 1), self.sampling.plausibility)
            codes = draw_with(filter_logits(flat, self.sampling), words[:, :, q].flatten(0, 1))
            sampled = torch.cat([sampled, codes.view(*sampled.shape[:2], 1)], dim=-1)
        return sampled
