"""Early pruning: the candidates of a prompt are sampled part-way, the worst dropped, the others finished.

They are compared by the prior itself, while there is no image yet: the gain log p(codes | prompt) - NULL_WEIGHT ·
log p(codes | null) in likelihood of the codes so far. It costs nothing, since guidance computes both. The weight is the
anti-language model's of Li et al. 2016 (equation 9): at weight 1 (pointwise mutual information) the gain favours what
is odd, codes that the null finds even less likely than the prompt does, and picks the wrong candidates
(docs/performance.md). Another score may take its place. Those that are finished are the same images as without pruning:
dropping a row changes no other.

Letters: R prefixes, n candidates of each, s of them finished, N = R·n images, P prefix, T codes an image.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stage2_prior.base import Prior
from stage2_prior.sampling.engine import Engine
from stage2_prior.sampling.memory import in_halves, joined
from stage2_prior.sampling.sample import CodesSampled, Sampled, Sampler, batches, rows_of
from stage2_prior.sampling.selection import make_engine
from stage2_prior.sampling.settings import Sampling
from tessera.errors import InputError

# (the prefix's number in 0 .. R - 1, codes so far (m, position) int64) -> scores (m,), the highest are finished
Scorer = Callable[[int, Tensor], Tensor]

NULL_WEIGHT = 0.25
NEEDS_GUIDANCE = (
    "pruning by likelihood compares the prompt with none, which takes guidance; set a guidance_scale other than 1, or "
    "prune by the reranker"
)


class Plan(NamedTuple):
    position: int  # the candidates are compared when they have this many codes
    survivors: int  # how many of each prompt are finished


class Pruned(NamedTuple):
    chosen: Tensor  # (R, s) int64: which of each prefix's seeds were finished, ascending
    sampled: Sampled  # of R·s images in this order


def plan_pruning(candidates: int, length: int, budget: float, given: int = 0) -> Plan:
    """How to spend `budget`, a share in (0, 1) of the codes that all candidates take together.

    Half of it goes into comparing all of them, the other half into finishing the best; `given` of the `length` codes
    cost nothing. Raises InputError when that leaves no code to compare.
    """
    sampled, spend = length - given, budget * candidates * (length - given)
    survivors = max(1, int(budget / (2 - budget) * candidates + 1e-9))
    compared = int((spend - survivors * sampled) / max(1, candidates - survivors) + 1e-9)  # gets what rounding leaves
    if compared < 1:
        raise InputError(
            f"a candidate_budget of {budget:g} is too little for {candidates} candidates of {sampled} codes; "
            "raise it or ask for more candidates"
        )
    return Plan(given + compared, survivors)


def count_codes(plan: Plan, candidates: int, length: int, given: int, batch_size: int) -> int:
    """How many codes `sample_pruned` samples for a prompt, for those who report progress."""
    again = plan.survivors * (plan.position - given) if candidates > batch_size else 0
    return candidates * (plan.position - given) + plan.survivors * (length - plan.position) + again


@torch.inference_mode()
def sample_pruned(
    prior: Prior,
    prefix: Tensor,
    seeds: Sequence[int],
    plan: Plan,
    sampling: Sampling | None = None,
    progress: CodesSampled | None = None,
    batch_size: int = 64,
    *,
    scorer: Scorer | None = None,
    null: Tensor | None = None,
    first_codes: Tensor | None = None,
    engine: Engine | None = None,
) -> Pruned:
    """Samples the seeds (R·n, as of `sample`) up to the plan's position, and the best of each prefix to the end.

    They are compared by `scorer`, by default the prior's likelihood gain. At most `batch_size` images are sampled at
    once: where the candidates of one prefix are more, R must be 1, and the best are sampled again from the start, which
    gives the same images for more work. What does not fit in memory is sampled in smaller batches, and a warning is
    logged. Raises InputError when there is neither guidance nor a `scorer`.
    """
    sampling = sampling or Sampling()
    if scorer is None and not sampling.guided:
        raise InputError(NEEDS_GUIDANCE)
    used = engine or make_engine(prior)

    def prune(prefixes: slice, seeds: Sequence[int], batch_size: int) -> Pruned:
        nulls, numbers = rows_of(null, prefixes), range(prefixes.start, prefixes.stop)

        def begin(seeds: Sequence[int]) -> Sampler:
            return Sampler(
                prior, prefix[prefixes], seeds, sampling, null=nulls, first_codes=first_codes, engine=used, scored=True
            )

        def compare(sampler: Sampler) -> Tensor:
            """Samples up to the plan's position -> the score of each image (R, n)."""
            sampler.advance(plan.position, progress)
            if scorer is None:
                return likelihood_gain(sampler).view(len(numbers), -1)
            codes = sampler.codes[:, : plan.position].view(len(numbers), -1, plan.position)
            return torch.stack([scorer(number, rows).float() for number, rows in zip(numbers, codes, strict=True)])

        def finish(sampler: Sampler) -> Sampled:
            sampler.advance(prior.length, progress)
            return sampler.sampled

        if len(seeds) <= batch_size:
            sampler = begin(seeds)
            scores = compare(sampler)  # (R, n)
            chosen = best_of(scores, plan.survivors)
            first = torch.arange(len(numbers), device=chosen.device)[:, None] * scores.shape[1]
            sampler.keep((first + chosen).flatten())
            return Pruned(chosen, finish(sampler))
        scores = torch.cat([compare(begin(batch)) for batch in batches(seeds, batch_size)], dim=1)  # (1, n)
        chosen = best_of(scores, plan.survivors)
        finished = [seeds[i] for i in chosen[0].tolist()]
        return Pruned(chosen, joined([finish(begin(batch)) for batch in batches(finished, batch_size)]))

    return in_halves(prune, slice(0, len(prefix)), seeds, batch_size)


def likelihood_gain(sampler: Sampler) -> Tensor:
    """log p(codes so far | prefix) - NULL_WEIGHT · log p(codes so far | null) of each image (N,), by the prior."""
    gains = sampler.log_probs - NULL_WEIGHT * sampler.null_log_probs  # (N, T), 0 where nothing is sampled yet
    return gains.sum(-1)


def best_of(scores: Tensor, count: int) -> Tensor:
    """(R, n) -> indices of the `count` highest of each row (R, count), ascending; the first among equals."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort(-1).values
