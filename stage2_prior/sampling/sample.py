"""Ancestral sampling with a cache: the prefix is computed once for all candidates, guidance is more rows of the batch.

An image depends on its prefix, its seed and the settings alone: every row has its own random generator, so candidate i
is the same in a batch of 1 or 64. Every code uses its share of the generator whether it is sampled or given: with its
own first codes given, a seed samples the same image again.

Letters: R prefixes, N images, P prefix, T codes an image, K codebook size.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stage2_prior.base import Prior
from stage2_prior.sampling.engine import Engine
from stage2_prior.sampling.memory import in_halves, joined
from stage2_prior.sampling.noise import draw_with, words_of
from stage2_prior.sampling.selection import make_engine
from stage2_prior.sampling.settings import Sampling, filter_logits, guidance_at, guide
from tessera.errors import InputError

CodesSampled = Callable[[int], None]  # codes sampled since the last call


class Sampled(NamedTuple):
    codes: Tensor  # (N, T) int64
    log_probs: Tensor  # (N, T) float32, log p(code | prefix, codes before it) of the prior: no guidance, no filters
    drawn_log_probs: Tensor  # (N, T) float32, under the distribution that was sampled; 0 for a code that was given


def sample(
    prior: Prior,
    prefix: Tensor,
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    progress: CodesSampled | None = None,
    *,
    null: Tensor | None = None,
    first_codes: Tensor | None = None,
    engine: Engine | None = None,
) -> Tensor:
    """Samples one image's codes for each seed: (N, T) int64 on the prior's device.

    `prefix` (R, P): each row serves N / R seeds in a row; one row serves all. `null` (1, P) or (R, P) is what guidance
    steers away from, by default the prior's null prefix. `first_codes` (n,), n < T, are the first codes of every image;
    the others are sampled. `engine` is the prior's, None makes one for this call: make one with `make_engine` to sample
    often. What does not fit in memory is sampled in parts: the same images, and a warning is logged. Raises InputError
    when N is not a multiple of R, for given codes that are not codes, or for an engine that is not this prior's or that
    holds weights from before a change.
    """
    return sample_scored(
        prior, prefix, seeds, sampling, progress, null=null, first_codes=first_codes, engine=engine, scored=False
    ).codes


def sample_scored(
    prior: Prior,
    prefix: Tensor,
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    progress: CodesSampled | None = None,
    *,
    null: Tensor | None = None,
    first_codes: Tensor | None = None,
    engine: Engine | None = None,
    scored: bool = True,
) -> Sampled:
    """`sample` with the log-probabilities of the codes, which cost one more softmax a code; zeros unless `scored`."""
    check_seeds(prefix, seeds)
    used = engine or make_engine(prior)

    def sample_batches(prefixes: slice, seeds: Sequence[int], batch_size: int) -> Sampled:
        nulls, results = rows_of(null, prefixes), []
        for batch in batches(seeds, batch_size):
            sampler = Sampler(
                prior, prefix[prefixes], batch, sampling, null=nulls, first_codes=first_codes, engine=used,
                scored=scored,
            )  # fmt: skip
            sampler.advance(prior.length, progress)
            results.append(sampler.sampled)
        return joined(results)

    return in_halves(sample_batches, slice(0, len(prefix)), seeds, len(seeds))


class Sampler:
    """Images that are being sampled: `advance` samples further codes, `keep` drops images."""

    @torch.inference_mode()
    def __init__(
        self,
        prior: Prior,
        prefix: Tensor,
        seeds: Sequence[int],
        sampling: Sampling | None = None,
        *,
        null: Tensor | None = None,
        first_codes: Tensor | None = None,
        engine: Engine | None = None,
        scored: bool = False,
    ) -> None:
        """Reads the prefixes and the given codes; arguments as of `sample`. `scored` keeps log-probabilities."""
        check_seeds(prefix, seeds)
        self.engine = engine or make_engine(prior)
        self.engine.check(prior)
        self.prior, self.sampling, self.scored = prior, sampling or Sampling(), scored
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        given = check_first_codes(prior, first_codes).to(prefix.device)  # (n,)
        self.given = self.position = len(given)  # the first code that is sampled, the next one

        # The unconditional rows stand below the conditional ones: one for all prefixes, or one for each.
        rows = torch.arange(len(prefix), device=prefix.device).repeat_interleave(len(seeds) // len(prefix))
        images = rows
        if self.sampling.guided:
            null = prior.unconditional(prefix) if null is None else null.to(prefix.device)
            rows = torch.cat([rows, len(prefix) + rows % len(null)])
            prefix = torch.cat([prefix, null])

        shape = len(seeds), prior.length
        self.codes = torch.zeros(shape, dtype=torch.int64, device=prefix.device)
        self.codes[:, : self.given] = given
        # Kept when scored: under the prefix, under the null (when guided), under the distribution that is sampled.
        self.log_probs, self.null_log_probs, self.drawn_log_probs = self.codes.new_zeros(
            3, *shape, dtype=torch.float32
        ).unbind()

        logits, self.cache = self.engine.prefill(prefix, prior.length - 1)
        for position, code in enumerate(given):
            if scored:
                values = logits.float().log_softmax(-1)[:, code][rows]
                self.log_probs[:, position] = values[: len(images)]
                self.null_log_probs[:, position] = values[-len(images) :]
            words_of(self.generators)  # what sampling it would have taken
            logits = self.engine.step(code.expand(len(prefix)), self.cache)
        self.logits = logits[rows]  # (N, K), or (2N, K) when guided; of the code at `position` until one is sampled
        self.cache = self.cache.repeat(rows)

    @torch.inference_mode()
    def advance(self, until: int, progress: CodesSampled | None = None) -> None:
        """Samples the codes of all images up to position `until`."""
        for position in range(self.position, until):
            if position > self.given:
                last = self.codes[:, position - 1]
                rows = torch.cat([last, last]) if self.sampling.guided else last
                self.logits = self.engine.step(rows, self.cache)
            self.codes[:, position] = self._draw(position)
            self.position = position + 1
            if progress is not None:
                progress(len(self.codes))

    @property
    def sampled(self) -> Sampled:
        """The images so far; log-probabilities are 0 for codes that are not sampled yet, and unless `scored`."""
        return Sampled(self.codes, self.log_probs, self.drawn_log_probs)

    @torch.inference_mode()
    def keep(self, images: Tensor) -> None:
        """Drops all images but these, (M,) int64 in [0, N), in this order."""
        rows = torch.cat([images, images + len(self.codes)]) if self.sampling.guided else images
        self.logits, self.cache = self.logits[rows], self.cache.repeat(rows)
        self.codes, self.log_probs = self.codes[images], self.log_probs[images]
        self.null_log_probs, self.drawn_log_probs = self.null_log_probs[images], self.drawn_log_probs[images]
        self.generators = [self.generators[image] for image in images.tolist()]

    def _draw(self, position: int) -> Tensor:
        """The logits -> a code for each image (N,)."""
        logits = conditional = self.logits.float()
        if self.sampling.guided:
            conditional, null = logits.chunk(2)
            scale = guidance_at(self.sampling, position, self.prior.length)
            logits = guide(conditional, null, scale, self.sampling.plausibility)
        logits = filter_logits(logits, self.sampling)
        codes = draw(logits, self.generators)
        if self.scored:
            self.log_probs[:, position] = log_prob(conditional, codes)
            self.drawn_log_probs[:, position] = log_prob(logits, codes)
            if self.sampling.guided:
                self.null_log_probs[:, position] = log_prob(null, codes)
        return codes


def draw(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One code a row in proportion to exp(logits), (N, K) -> (N,) int64, each row with its own generator."""
    return draw_with(logits, words_of(generators))


def log_prob(logits: Tensor, codes: Tensor) -> Tensor:
    """(N, K) and (N,) int64 -> log of each code's probability (N,)."""
    return logits.log_softmax(-1).gather(-1, codes.unsqueeze(-1)).squeeze(-1)


def rows_of(null: Tensor | None, prefixes: slice) -> Tensor | None:
    """The null prefixes (1, P) or (R, P) of some of the R prefixes."""
    return null if null is None or len(null) == 1 else null[prefixes]


def batches(seeds: Sequence[int], size: int) -> list[Sequence[int]]:
    return [seeds[start : start + size] for start in range(0, len(seeds), size)]


def check_seeds(prefix: Tensor, seeds: Sequence[int]) -> None:
    """Raises InputError unless the seeds are a multiple of the prefixes (R, P)."""
    if not seeds or len(seeds) % len(prefix):
        raise InputError(f"the number of seeds must be a multiple of the {len(prefix)} prefixes, got {len(seeds)}")


def check_first_codes(prior: Prior, codes: Tensor | None) -> Tensor:
    """The given codes as (n,) int64, none for None. Raises InputError unless they are fewer than T and in [0, K)."""
    if codes is None:
        return torch.empty(0, dtype=torch.int64)
    if codes.ndim != 1 or codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise InputError(f"first_codes must be (n,) whole numbers, got {tuple(codes.shape)} of {codes.dtype}")
    if len(codes) >= prior.length:
        raise InputError(f"first_codes must leave something to draw of {prior.length} codes, got {len(codes)}")
    if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < prior.codebook_size:
        wrong = int(codes.min()) if codes.min() < 0 else int(codes.max())
        raise InputError(f"first_codes must be in [0, {prior.codebook_size}), got {wrong}")
    return codes.to(torch.int64)
