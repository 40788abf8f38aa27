"""Early pruning: the candidates of a prompt are drawn part-way, the least promising dropped, the rest finished.

What is promising is said by the prior itself, while there is no picture yet: the gain log p(codes | prompt) -
NULL_WEIGHT · log p(codes | null) in likelihood of the codes so far. It costs nothing, since guidance computes both. The
weight is the anti-language model's of Li et al. 2016 (equation 9): at weight 1 (pointwise mutual information) the gain
favours what is odd, codes that the null finds even less likely than the prompt does, and picks the wrong candidates
(docs/performance.md). Another score may take its place. Those that are finished are the same images as without pruning:
dropping a row changes no other.

Letters: R prefixes, n candidates of each, s of them finished, N = R·n images, P prefix, T codes an image.
"""

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stage2_prior.base import Prior
from stage2_prior.sampling.parts import is_out_of_memory, joined, make_room
from stage2_prior.sampling.sample import Drawing, Progress, Sampled
from stage2_prior.sampling.settings import Sampling
from tessera.errors import InputError

# (the prefix's number in 0 .. R - 1, codes so far (m, position) int64) -> (m,), higher is more promising
Promise = Callable[[int, Tensor], Tensor]

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

    Half of it goes into looking at all of them, the other half into finishing the best; `given` of the `length` codes
    are there from the start and cost nothing. Raises InputError when that leaves no code to look at.
    """
    drawn, spend = length - given, budget * candidates * (length - given)
    survivors = max(1, int(budget / (2 - budget) * candidates + 1e-9))
    looked_at = int((spend - survivors * drawn) / max(1, candidates - survivors) + 1e-9)  # rounding goes to looking
    if looked_at < 1:
        raise InputError(
            f"a candidate_budget of {budget:g} is too little for {candidates} candidates of {drawn} codes; "
            "raise it or ask for more candidates"
        )
    return Plan(given + looked_at, survivors)


def codes_drawn(plan: Plan, candidates: int, length: int, given: int, batch_size: int) -> int:
    """How many codes `sample_pruned` draws for a prompt, for those who report progress."""
    again = plan.survivors * (plan.position - given) if candidates > batch_size else 0
    return candidates * (plan.position - given) + plan.survivors * (length - plan.position) + again


@torch.inference_mode()
def sample_pruned(
    prior: Prior,
    prefix: Tensor,
    seeds: Sequence[int],
    plan: Plan,
    sampling: Sampling | None = None,
    progress: Progress | None = None,
    batch_size: int = 64,
    *,
    promise: Promise | None = None,
    null: Tensor | None = None,
    first_codes: Tensor | None = None,
) -> Pruned:
    """Draws the seeds (R·n, as `sample` takes them) up to the plan's position, and the best of each prefix to the end.

    They are compared by `promise`, by default the prior's likelihood gain. At most `batch_size` images are drawn at
    once: where the candidates of one prefix are more, R must be 1, and the best are drawn again from the start, which
    gives the same images for more work. What does not fit in memory is drawn in smaller batches, and a line says so.
    Raises InputError when there is neither guidance nor a `promise`.
    """
    sampling = sampling or Sampling()
    if promise is None and not sampling.guided:
        raise InputError(NEEDS_GUIDANCE)

    def draw(which: slice, seeds: Sequence[int], at_once: int) -> Pruned:
        """The prefixes `which` and their seeds."""
        own = null if null is None or len(null) == 1 else null[which]
        prefixes = range(which.start, which.stop)

        def begin(seeds: Sequence[int]) -> Drawing:
            return Drawing(prior, prefix[which], seeds, sampling, null=own, first_codes=first_codes, scored=True)

        def look(drawing: Drawing) -> Tensor:
            """Draws up to the plan's position -> how promising each image is (R, n)."""
            drawing.advance(plan.position, progress)
            if promise is None:
                return likelihood_gain(drawing).view(len(prefixes), -1)
            codes = drawing.codes[:, : plan.position].view(len(prefixes), -1, plan.position)
            return torch.stack([promise(number, some).float() for number, some in zip(prefixes, codes, strict=True)])

        def finish(drawing: Drawing) -> Sampled:
            drawing.advance(prior.length, progress)
            return drawing.sampled

        if len(seeds) <= at_once:
            drawing = begin(seeds)
            promises = look(drawing)  # (R, n)
            chosen = most_promising(promises, plan.survivors)
            first = torch.arange(len(prefixes), device=chosen.device)[:, None] * promises.shape[1]
            drawing.keep((first + chosen).flatten())
            return Pruned(chosen, finish(drawing))
        promises = torch.cat([look(begin(some)) for some in _parts(seeds, at_once)], dim=1)  # (1, n)
        chosen = most_promising(promises, plan.survivors)
        finished = [finish(begin(some)) for some in _parts([seeds[i] for i in chosen[0].tolist()], at_once)]
        return Pruned(chosen, joined(finished))

    def draw_what_fits(which: slice, seeds: Sequence[int], at_once: int) -> Pruned:
        """Out of memory, half of the prefixes after the other, or half as many candidates of the only one at once."""
        try:
            return draw(which, seeds, at_once)
        except (MemoryError, RuntimeError) as error:
            if min(len(seeds), at_once) == 1 or not is_out_of_memory(error):
                raise
        make_room()
        count, each = which.stop - which.start, len(seeds) // (which.stop - which.start)
        if count == 1:
            most = min(len(seeds), at_once)
            print(f"{most} images at once do not fit in memory; drawing {most // 2} at once", file=sys.stderr)
            return draw_what_fits(which, seeds, most // 2)
        middle = which.start + count // 2
        cut = count // 2 * each
        print(
            f"{len(seeds)} images at once do not fit in memory; drawing {cut} and {len(seeds) - cut}", file=sys.stderr
        )
        halves = ((slice(which.start, middle), seeds[:cut]), (slice(middle, which.stop), seeds[cut:]))
        chosen, sampled = zip(*(draw_what_fits(which, some, at_once) for which, some in halves), strict=True)
        return Pruned(torch.cat(chosen), joined(sampled))

    return draw_what_fits(slice(0, len(prefix)), seeds, batch_size)


def likelihood_gain(drawing: Drawing) -> Tensor:
    """log p(codes so far | prefix) - NULL_WEIGHT · log p(codes so far | null) of each image (N,), by the prior."""
    gains = drawing.log_probs - NULL_WEIGHT * drawing.null_log_probs  # (N, T), 0 where nothing is drawn yet
    return gains.sum(-1)


def most_promising(promises: Tensor, count: int) -> Tensor:
    """(R, n) -> indices of the `count` highest of each row (R, count), ascending; the first among equals."""
    return promises.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort(-1).values


def _parts(seeds: Sequence[int], size: int) -> list[Sequence[int]]:
    return [seeds[start : start + size] for start in range(0, len(seeds), size)]
