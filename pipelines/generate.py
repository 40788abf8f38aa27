"""The way of a prompt: check -> prefix -> sample -> decode -> score -> rank.

Letters: N candidates, Q codebooks, h w code grid, T = Q·h·w codes an image, H W pixels, P prefix.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from pipelines.beside import beside
from pipelines.bundle import Bundle
from pipelines.edit import prior_of_missing
from pipelines.memory import batch_size, batches
from pipelines.prefix import negative_prefix, prompt_prefixes
from pipelines.pruning import image_scorer, plan_of
from pipelines.request import Request
from rerank import Reranker
from stage2_prior.base import Prior
from stage2_prior.sampling import Engine, make_engine
from stage2_prior.sampling.prune import Plan, count_codes, sample_pruned
from stage2_prior.sampling.sample import check_first_codes, sample_scored
from tessera.images import to_pil

Progress = Callable[[int, int], None]  # codes sampled so far, codes to sample in all


class Generated(NamedTuple):
    """Prompt after prompt, best first; without a reranker in the order of the seeds.

    Log-probabilities are of the codes in the order in which they are sampled (in raster order, the codebooks of a
    position together), None unless they were asked for; their sum over T is the image's. Where known codes are given, T
    counts the others alone.
    """

    images: list[Image.Image]
    scores: list[float] | None  # None when nothing was reranked
    seeds: list[int]  # pipeline(prompt, seed=s, num_candidates=1) samples that image again
    codes: Tensor  # (number of images, Q, h, w) int64
    log_probs: Tensor | None = None  # (number of images, T): the prior's own given the prompt, no guidance, no filters
    drawn_log_probs: Tensor | None = None  # (number of images, T): under what was sampled from; 0 for given codes


class Candidate(NamedTuple):
    image: Image.Image
    score: float | None  # None when nothing was reranked
    seed: int
    codes: Tensor  # (Q, h, w) int64
    log_probs: Tensor  # (T,) float32, see `Generated`; zeros unless they were asked for
    drawn_log_probs: Tensor  # (T,) float32


class SampledCodes(NamedTuple):
    """Finished candidates of one prompt, before they are images."""

    prompt: str
    seeds: Sequence[int]
    codes: Tensor  # (n, T) int64
    log_probs: Tensor  # (n, T)
    drawn_log_probs: Tensor  # (n, T)


class Job(NamedTuple):
    """A request that this bundle can fulfil, with what all of its batches share."""

    request: Request  # resolved: nothing is left to the bundle's defaults
    bundle: Bundle
    prior: Prior  # the bundle's, or that of the missing codes where some are known
    engine: Engine
    reranker: Reranker | None  # that ranks
    plan: Plan | None  # of early pruning
    prefixes: Tensor  # (prompts, P)
    null: Tensor | None  # (1, P), the negative prompt's prefix
    first_codes: Tensor  # (n,)
    batch_size: int

    @property
    def ranked_by_likelihood(self) -> bool:
        return self.reranker is not None and bool(self.request.likelihood_weight)

    @property
    def finished(self) -> int:
        """Candidates of a prompt that are finished."""
        return len(self.request.candidate_seeds) if self.plan is None else self.plan.survivors


def generate(
    bundle: Bundle, engine: Callable[[], Engine], request: Request, progress: Progress | None = None
) -> Iterator[Generated]:
    """All finished candidates of each prompt, best first, as soon as they are there, while the next are sampled.

    Everything is checked before this returns. Raises InputError for what the bundle cannot do.
    """
    job = check(bundle, engine, request)
    sampled = sample_batches(job, progress)
    candidates = beside(sampled, lambda codes: decode_and_score(codes, job), bundle.device)
    return (rank(prompt, job) for prompt in by_prompt(candidates, job.finished))


def check(bundle: Bundle, engine: Callable[[], Engine], request: Request) -> Job:
    """Everything that can fail, and the prefixes. Warns (InputWarning) of prompts that are cut."""
    request = request.resolved(bundle.sampling, bundle.likelihood_weight)
    assert request.sampling is not None
    prior = bundle.prior
    first_codes = check_first_codes(prior, torch.tensor(request.first_codes or (), dtype=torch.int64))
    if request.known_codes is not None:
        prior = prior_of_missing(prior, request.known_codes)
    plan = plan_of(request, bundle, prior.length, len(first_codes))
    rows = batch_size(request, bundle)
    null = negative_prefix(request, bundle)
    scored = request.rerank or (plan is not None and request.prune_by == "reranker")
    prefixes = prompt_prefixes(request.prompts, bundle, bundle.reranker if scored else None)
    engine_of_prior = engine() if prior is bundle.prior else make_engine(prior)
    reranker = bundle.reranker if request.rerank else None
    return Job(request, bundle, prior, engine_of_prior, reranker, plan, prefixes, null, first_codes, rows)


def sample_batches(job: Job, progress: Progress | None) -> Iterator[list[SampledCodes]]:
    """Batch after batch, the codes of each of its prompts."""
    request, prior, plan = job.request, job.prior, job.plan
    prompts, candidates, given = len(request.prompts), len(request.candidate_seeds), len(job.first_codes)
    codes_of_prompt = candidates * (prior.length - given)
    if plan is not None:
        codes_of_prompt = count_codes(plan, candidates, prior.length, given, job.batch_size)
    total, done = prompts * codes_of_prompt, 0

    def report(codes: int) -> None:
        nonlocal done
        done += codes
        if progress is not None:
            progress(done, total)

    shared: dict[str, Any] = {"null": job.null, "first_codes": job.first_codes, "engine": job.engine}
    for first, last, seeds in batches(prompts, request.candidate_seeds, job.batch_size, whole=plan is not None):
        texts, prefix = [str(prompt) for prompt in request.prompts[first:last]], job.prefixes[first:last]
        repeated = list(seeds) * len(texts)
        if plan is not None:
            scorer = image_scorer(texts, prior, job.bundle) if request.prune_by == "reranker" else None
            chosen, sampled = sample_pruned(
                prior, prefix, repeated, plan, request.sampling, report, job.batch_size, scorer=scorer, **shared
            )
            seeds_of = [[seeds[i] for i in row] for row in chosen.tolist()]
        else:
            scored = request.log_probs or job.ranked_by_likelihood
            sampled = sample_scored(prior, prefix, repeated, request.sampling, report, scored=scored, **shared)
            seeds_of = [list(seeds)] * len(texts)
        parts = [part.view(len(texts), -1, prior.length).unbind() for part in sampled]  # each (n, T), prompt by prompt
        yield [SampledCodes(*prompt) for prompt in zip(texts, seeds_of, *parts, strict=True)]


def decode_and_score(sampled: SampledCodes, job: Job) -> list[Candidate]:
    """The images of one prompt's codes, with scores where there is a reranker."""
    codes = job.prior.grid(sampled.codes)  # (n, Q, h, w)
    images = job.bundle.decode(codes)  # (n, 3, H, W)
    scores: list[float | None] = [None] * len(codes)
    if job.reranker is not None:
        scores = [*score(sampled, images, codes, job).tolist()]
    parts = to_pil(images), scores, sampled.seeds, codes.cpu(), sampled.log_probs.cpu(), sampled.drawn_log_probs.cpu()
    return [Candidate(*one) for one in zip(*parts, strict=True)]


def score(sampled: SampledCodes, images: Tensor, codes: Tensor, job: Job) -> Tensor:
    """How well each image fits, (n,): the reranker's score, and the likelihood where that counts."""
    assert job.reranker is not None
    scores = job.reranker.score(sampled.prompt, images, codes)
    if job.ranked_by_likelihood:
        assert job.request.likelihood_weight is not None
        scores = scores + job.request.likelihood_weight * sampled.log_probs.sum(-1).to(scores.device)
    return scores


def by_prompt(candidates: Iterator[list[Candidate]], finished: int) -> Iterator[list[Candidate]]:
    """The `finished` candidates of each prompt, whose batches come one after another."""
    prompt: list[Candidate] = []
    for some in candidates:
        prompt += some
        if len(prompt) == finished:
            yield prompt
            prompt = []


def rank(candidates: list[Candidate], job: Job) -> Generated:
    """Best first; in the order of the seeds where nothing was scored."""
    ordered = sorted(candidates, key=lambda one: 0 if one.score is None else -one.score)
    images, scores, seeds, codes, log_probs, drawn_log_probs = zip(*ordered, strict=True)
    return Generated(
        list(images),
        None if job.reranker is None else list(scores),
        list(seeds),
        torch.stack(codes),
        torch.stack(log_probs) if job.request.log_probs else None,
        torch.stack(drawn_log_probs) if job.request.log_probs else None,
    )
