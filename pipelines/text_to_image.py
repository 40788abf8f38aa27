"""Prompt -> ranked pictures: the prior draws candidates, the image tokenizer decodes them, the reranker orders them.

Letters: N candidates, Q codebooks, h w code grid, T = Q·h·w codes an image, H W pixels, P prefix.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from pipelines.arguments import (
    check_keep,
    check_likelihood_weight,
    check_prompt,
    check_prompts,
    check_seeds,
    warn_of_cut,
    whole_number,
)
from pipelines.bundle import load_bundle, save_bundle
from pipelines.conditions import prompt_prefix
from pipelines.machine import find_device, free_memory
from rerank import ClipReranker, Reranker
from stage1_tokenizer import Autoencoder
from stage2_prior import Sampling, flatten_codes
from stage2_prior.base import Prior, PromptTooLong
from stage2_prior.infill import GapsPrior
from stage2_prior.lora import Loras
from stage2_prior.sampling.engine import Engine
from stage2_prior.sampling.prune import NEEDS_GUIDANCE, Plan, Scorer, count_codes, plan_pruning, sample_pruned
from stage2_prior.sampling.sample import check_first_codes, sample_scored
from stage2_prior.sampling.selection import check_precision, make_engine
from stage2_prior.sampling.settings import Precision
from tessera.config import validate
from tessera.errors import InputError, InputWarning
from tessera.images import fit, to_pil, to_tensor, white_cells

MOST_ROWS = 64  # candidates drawn at once unless told otherwise; more do not get faster on a CPU
MISSING = -1  # a code that is to be drawn, among those that are known

CPU = torch.device("cpu")

Progress = Callable[[int, int], None]  # codes drawn so far, codes to draw in all


class Candidate(NamedTuple):
    image: Image.Image
    score: float | None  # None when nothing was reranked
    seed: int
    codes: Tensor  # (Q, h, w) int64
    log_probs: Tensor  # (T,) float32, see `Generated`; zeros unless they were asked for
    drawn_log_probs: Tensor  # (T,) float32


class Generated(NamedTuple):
    """Prompt after prompt, best first; without a reranker in the order of the seeds.

    Log-probabilities are of the codes in the order in which they are drawn (row by row, the codebooks of a position
    together), None unless they were asked for; their sum over T is the image's. Where known codes are given, T counts
    the others alone.
    """

    images: list[Image.Image]
    scores: list[float] | None  # None when nothing was reranked
    seeds: list[int]  # pipeline(prompt, seed=s, num_candidates=1) draws that image again
    codes: Tensor  # (number of images, Q, h, w) int64
    log_probs: Tensor | None = None  # (number of images, T): the prior's own given the prompt, no guidance, no filters
    drawn_log_probs: Tensor | None = None  # (number of images, T): under what was drawn from; 0 for codes given


class Job(NamedTuple):
    """What all candidates of a call have in common."""

    prior: Prior  # that draws: the pipeline's, or of its gaps where codes are known
    seeds: Sequence[int]  # of each prompt
    sampling: Sampling
    reranker: Reranker | None  # that orders
    likelihood_weight: float  # of log p(codes | prompt) beside its score
    rows: int  # candidates drawn at once
    null: Tensor | None  # (1, P), the negative prompt's prefix
    first_codes: Tensor  # (n,)
    plan: Plan | None  # of early pruning
    judge: Reranker | None  # that early pruning goes by; None for the prior itself
    scored: bool  # log-probabilities are returned

    @property
    def ranked_by_likelihood(self) -> bool:
        return self.reranker is not None and self.likelihood_weight > 0


class Drawn(NamedTuple):
    """Some or all finished candidates of one prompt, before they are pictures."""

    prompt: str
    seeds: Sequence[int]
    codes: Tensor  # (n, T) int64
    log_probs: Tensor  # (n, T)
    drawn_log_probs: Tensor  # (n, T)


def decodes_beside(device: torch.device) -> bool:
    """Whether pictures are decoded while the next batch is drawn: not on a CPU, where each alone uses all cores."""
    return device.type != "cpu"


class TextToImagePipeline:
    """What `from_pretrained` loads and a call draws with."""

    def __init__(
        self,
        image_tokenizer: Autoencoder,
        prior: Prior,
        reranker: Reranker | None = None,
        sampling: Sampling | None = None,
        fingerprint: str | None = None,
        segmentation_tokenizer: Autoencoder | None = None,
        likelihood_weight: float = 0.0,
    ) -> None:
        """`sampling` and `likelihood_weight` are what a call takes unless told otherwise; `fingerprint` is the
        bundle's, None without. A prior that draws from segmentation maps needs the tokenizer of these.
        """
        self.image_tokenizer, self.prior, self.reranker = image_tokenizer, prior, reranker
        self.sampling, self.fingerprint = sampling or Sampling(), fingerprint
        self.segmentation_tokenizer, self.likelihood_weight = segmentation_tokenizer, likelihood_weight
        self.loras = Loras(prior)
        self._precision: Precision | None = None
        self._engine: Engine | None = None

    @property
    def precision(self) -> Precision | None:
        """What the engine keeps the prior's weights in, None the prior's own; see `make_engine`, also for errors."""
        return self._precision

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        check_precision(self.prior, precision)
        self._precision, self._engine = precision, None

    @property
    def engine(self) -> Engine:
        """What the prior's codes are computed by, made on first use. Tell it (`refresh`) when you change weights."""
        if self._engine is None or self._engine.prior is not self.prior:
            self._engine = make_engine(self.prior, self._precision)
        return self._engine

    def _refresh(self) -> None:
        """The prior's weights have changed."""
        if self._engine is not None:
            self._engine.refresh()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "emoji",
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        rerank: bool = True,
    ) -> "TextToImagePipeline":
        """A bundle shipped with the package, a local folder or a hub name, on a GPU if there is one.

        `rerank` False leaves the reranker out, which saves seconds. Raises InputError for an unknown or damaged bundle.
        """
        return cls(*load_bundle(name, device=find_device(device), dtype=dtype, rerank=rerank))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the pipeline as a bundle. Raises InputError for LoRAs that are not part of the prior."""
        if self.loras.applied:
            raise InputError(
                "the pipeline has LoRAs that are not fused; call fuse_lora() or unload_lora_weights() first"
            )
        if not isinstance(self.reranker, ClipReranker | None):
            raise InputError(f"a {type(self.reranker).__name__} cannot be saved in a bundle, only a ClipReranker can")
        save_bundle(
            folder,
            self.image_tokenizer,
            self.prior,
            self.reranker,
            self.sampling,
            self.segmentation_tokenizer,
            self.likelihood_weight,
        )

    def load_lora_weights(self, folder: str | Path, weight: float = 1.0) -> None:
        """Draws with `weight` times the LoRA in a folder or of a hub name from now on, beside those loaded before.

        Raises InputError when it cannot be read, or was trained on another prior.
        """
        try:
            self.loras.add(folder, weight)
        finally:
            self._refresh()

    def unload_lora_weights(self) -> None:
        """Draws without LoRAs again, bit by bit as before; those that were fused stay."""
        self.loras.remove()
        self._refresh()

    def fuse_lora(self) -> None:
        """Makes the LoRAs part of the prior for good, so that it can be saved, or be the base of another."""
        if self.loras.applied:
            self.fingerprint = None  # it draws other pictures than its bundle
        self.loras.fuse()

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_images_per_prompt: int | None = None,
        num_candidates: int = 16,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        plausibility: float | None = None,
        negative_prompt: str | None = None,
        first_codes: Tensor | Sequence[int] | None = None,
        known_codes: Tensor | Sequence[int] | None = None,
        sampling: Sampling | None = None,
        rerank: bool = True,
        likelihood_weight: float | None = None,
        candidate_budget: float | None = None,
        prune_by: Literal["likelihood", "reranker"] = "likelihood",
        log_probs: bool = False,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> Generated:
        """Draws `num_candidates` for each prompt and returns the `num_images_per_prompt` (4) that fit best, best first.

        A prompt is text, or, where the prior draws from these, a `ClassLabel` or `SegmentationMap` of conditions.py.
        Candidate i has seed `seed + i`, or `seeds[i]`; a picture depends on prompt, seed and sampling alone. What of
        `Sampling` is None is `sampling`'s, by default the bundle's; top_k 0 takes all codes, as do top_p 1, min_p 0 and
        plausibility 0. `negative_prompt` takes the place of the empty prompt that guidance steers away from.
        `first_codes` (n,) are the first codes of every picture, as `codes_of_top` gives them; the rest is drawn.
        `known_codes` (T,) are all codes of every picture, -1 for those that are drawn, as `codes_outside` gives them.
        Pictures are ordered by the reranker's score plus `likelihood_weight`, by default the bundle's, times
        log p(codes | prompt) in nats, the prior's own without guidance or filters; `scores` are these sums.
        `candidate_budget` (below 1) is the share of the codes of all candidates that may be drawn: the least promising,
        by the prior's own likelihood or by the reranker, are dropped part-way, see `stage2_prior/sampling/prune.py`.
        `log_probs` returns those of the codes.
        `batch_size` candidates are drawn at once, by default as many as fit in memory up to 64. Everything is checked
        before the first is drawn.

        Warns (InputWarning) of a prompt that is too long for prior or reranker and cut, saying what was left out, and
        of guidance on a prior that never learned to draw without a prompt. Raises InputError: a prompt that is empty,
        binary or without words; counts, seeds, codes, sampling or weights out of range; a negative prompt without
        guidance; more than fits in memory.
        """
        streamed = self.stream(
            prompt,
            num_candidates=num_candidates,
            seed=seed,
            seeds=seeds,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            plausibility=plausibility,
            negative_prompt=negative_prompt,
            first_codes=first_codes,
            known_codes=known_codes,
            sampling=sampling,
            rerank=rerank,
            likelihood_weight=likelihood_weight,
            candidate_budget=candidate_budget,
            prune_by=prune_by,
            log_probs=log_probs,
            batch_size=batch_size,
            progress=progress,
        )
        count = 1 if isinstance(prompt, str) else len(prompt)
        candidates = num_candidates if seeds is None else len(seeds)
        finished = self.count_finished(candidates, candidate_budget)
        keep = check_keep(num_images_per_prompt, candidates, finished)
        self._check_memory((count * keep + candidates) * self._picture_bytes(), candidates, count)
        drawn = list(streamed)

        def best(name: str) -> list[Any]:
            """The first `keep` of each prompt, one after the other."""
            return [part for one in drawn for part in getattr(one, name)[:keep]]

        return Generated(
            best("images"),
            None if drawn[0].scores is None else best("scores"),
            best("seeds"),
            torch.stack(best("codes")),
            torch.stack(best("log_probs")) if log_probs else None,
            torch.stack(best("drawn_log_probs")) if log_probs else None,
        )

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        num_candidates: int = 16,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        plausibility: float | None = None,
        negative_prompt: str | None = None,
        first_codes: Tensor | Sequence[int] | None = None,
        known_codes: Tensor | Sequence[int] | None = None,
        sampling: Sampling | None = None,
        rerank: bool = True,
        likelihood_weight: float | None = None,
        candidate_budget: float | None = None,
        prune_by: Literal["likelihood", "reranker"] = "likelihood",
        log_probs: bool = False,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Generated]:
        """All finished candidates of each prompt, best first, as soon as they are there, while the next are drawn.

        For many prompts; arguments, warnings and errors as of a call, before the first is drawn.
        """
        prompts = check_prompts(prompt)
        seeds = check_seeds(num_candidates, seed, seeds)
        settings = self.settings(
            sampling,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            plausibility=plausibility,
        )
        given = check_first_codes(self.prior, whole_numbers("first_codes", first_codes))
        prior = self.prior
        if known_codes is not None:
            if len(given):
                raise InputError("known_codes say of every code whether it is given; leave first_codes out")
            prior = self._gaps(whole_numbers("known_codes", known_codes))
        plan = self._plan(candidate_budget, prune_by, len(seeds), prior.length, len(given), settings)
        job = Job(
            prior,
            seeds,
            settings,
            self.reranker if rerank else None,
            check_likelihood_weight(self.likelihood_weight if likelihood_weight is None else likelihood_weight),
            self._rows(len(prompts), len(seeds), settings, batch_size),
            self._null(negative_prompt, settings),
            given,
            plan,
            self.reranker if plan is not None and prune_by == "reranker" else None,
            log_probs,
        )
        prefixes = self.prefixes(prompts, job.reranker or job.judge)
        candidates = self._draw(prompts, prefixes, job, progress)
        return (_generated(sorted(own, key=_best_first), job) for own in candidates)

    def count_finished(self, num_candidates: int, candidate_budget: float | None) -> int:
        """How many candidates of a prompt are finished."""
        if candidate_budget is None or candidate_budget == 1:
            return num_candidates
        return plan_pruning(num_candidates, self.prior.length, candidate_budget).survivors

    def settings(self, sampling: Sampling | None = None, **changes: Any) -> Sampling:
        """`sampling` (the bundle's) with those `changes` that are not None. Raises InputError out of range."""
        given = {name: value for name, value in changes.items() if value is not None}
        for name, value in given.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{name} must be a finite number, got {value}")
        given |= {name: None for name in ("top_k", "min_p", "plausibility") if given.get(name) == 0}
        return validate(Sampling, {**(sampling or self.sampling).model_dump(), **given}, where="sampling")

    def infill(self, image: Image.Image, mask: Image.Image, prompt: str | Sequence[str], **drawing: Any) -> Generated:
        """Draws the white parts of a picture's mask anew as the prompt says and keeps the codes of the others.

        Also called inpainting. The mask is of the picture's size, see `codes_outside`; `drawing` is what a call takes.
        Raises InputError as both do, and when the prior draws in one order only.
        """
        return self(prompt, known_codes=self.codes_outside(image, mask), **drawing)

    def prefixes(self, prompts: Sequence[str], reranker: Reranker | None = None) -> Tensor:
        """What the prior reads, (prompts, P). Of a prompt that is too long a warning shows what is left out.

        Given the reranker that will score, the warning is of what that leaves out as well.
        """
        several = len(prompts) > 1
        return torch.cat(
            [
                self._prefix(text, f"prompt {i}" if several else "the prompt", reranker)
                for i, text in enumerate(prompts, 1)
            ]
        )

    def codes_of_top(self, image: Image.Image, rows: int | None = None) -> Tensor:
        """The codes (n,) of the upper `rows` of the code grid (by default half) of a picture, for `first_codes`.

        The picture is scaled and cut to the tokenizer's size. Raises InputError unless 1 <= rows < h.
        """
        height = self.image_tokenizer.code_shape[1]
        rows = height // 2 if rows is None else whole_number("top_rows", rows)
        if rows >= height:
            raise InputError(f"top_rows must be below {height}, the rows of codes in a picture, got {rows}")
        return flatten_codes(self._encode(image)[:, :, :rows])[0]

    def codes_outside(self, image: Image.Image, mask: Image.Image) -> Tensor:
        """The codes (T,) of a picture, -1 in every cell of the code grid that its mask is white in, for `known_codes`.

        Both are scaled and cut to the tokenizer's size; one white pixel (`white_cells`) is enough. Raises InputError
        when their sizes differ or the mask is black.
        """
        if image.size != mask.size:
            (width, height), (wide, high) = image.size, mask.size
            raise InputError(
                f"the picture has {width}x{height} pixels and its mask {wide}x{high}; a mask has one for each of them"
            )
        white = white_cells(mask, self.image_tokenizer.code_shape[1:])
        if not white.any():
            raise InputError(
                "the mask is black all over the square that is drawn, so everything stays; paint white what is to be "
                "drawn anew"
            )
        return flatten_codes(self._encode(image).masked_fill(white.to(self._device), MISSING))[0]

    # Inside ----------------------------------------------------------------------------------------------------------

    def _draw(
        self, prompts: list[str], prefixes: Tensor, job: Job, progress: Progress | None
    ) -> Iterator[list[Candidate]]:
        """All finished candidates of each prompt in the order of the seeds, prompt after prompt."""
        count = len(job.seeds) if job.plan is None else job.plan.survivors
        drawn: list[Candidate] = []  # of the prompt under way
        for some in self._decoded(self._sampled(prompts, prefixes, job, progress), job):
            drawn += some
            if len(drawn) == count:
                yield drawn
                drawn = []

    def _decoded(self, batches: Iterator[list[Drawn]], job: Job) -> Iterator[list[Candidate]]:
        """Each of the drawn as pictures with scores, made beside the drawing of the next batch or after it."""
        if not decodes_beside(self._device):
            for batch in batches:
                yield from (self._candidates(drawn, job, None) for drawn in batch)
            return
        with ThreadPoolExecutor(1) as decoder:
            stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
            before: list[Future[list[Candidate]]] = []  # of the batch that was decoded while this one was drawn
            for batch in batches:
                if stream is not None:
                    stream.wait_stream(torch.cuda.current_stream(self._device))  # what is decoded must have been drawn
                under_way = [decoder.submit(self._candidates, drawn, job, stream) for drawn in batch]
                yield from (future.result() for future in before)
                before = under_way
            yield from (future.result() for future in before)

    def _sampled(
        self, prompts: list[str], prefixes: Tensor, job: Job, progress: Progress | None
    ) -> Iterator[list[Drawn]]:
        """Batch after batch, what was drawn for each of its prompts."""
        length, done = job.prior.length, 0
        candidates, there = len(job.seeds), len(job.first_codes)
        each = candidates * (length - there)
        if job.plan is not None:
            each = count_codes(job.plan, candidates, length, there, job.rows)
        total = len(prompts) * each

        def report(codes: int) -> None:
            nonlocal done
            done += codes
            if progress is not None:
                progress(done, total)

        engine = self.engine if job.prior is self.prior else make_engine(job.prior)
        given: dict[str, Any] = {"null": job.null, "first_codes": job.first_codes, "engine": engine}
        for first, last, seeds in batches(len(prompts), job.seeds, job.rows, whole=job.plan is not None):
            texts, prefix, every = prompts[first:last], prefixes[first:last], list(seeds) * (last - first)
            if job.plan is not None:
                scorer = None if job.judge is None else self._scorer(texts, job.prior, job.judge)
                chosen, sampled = sample_pruned(
                    job.prior, prefix, every, job.plan, job.sampling, report, job.rows, scorer=scorer, **given
                )
                own_seeds = [[seeds[i] for i in row] for row in chosen.tolist()]
            else:
                scored = job.scored or job.ranked_by_likelihood
                sampled = sample_scored(job.prior, prefix, every, job.sampling, report, scored=scored, **given)
                own_seeds = [list(seeds)] * len(texts)
            parts = [part.view(len(texts), -1, length).unbind() for part in sampled]  # each (n, T), prompt by prompt
            yield [Drawn(*prompt) for prompt in zip(texts, own_seeds, *parts, strict=True)]

    def _candidates(self, drawn: Drawn, job: Job, stream: "torch.cuda.Stream | None") -> list[Candidate]:
        """Decodes and scores what was drawn for a prompt, on a GPU on a stream of its own."""
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            codes = job.prior.grid(drawn.codes)  # (n, Q, h, w)
            images = self._decode(codes)  # (n, 3, H, W)
            scores = [None] * len(codes)
            if job.reranker is not None:
                fits = job.reranker.score(drawn.prompt, images, codes)
                if job.ranked_by_likelihood:
                    fits = fits + job.likelihood_weight * drawn.log_probs.sum(-1).to(fits.device)
                scores = fits.tolist()
            parts = to_pil(images), scores, drawn.seeds, codes.cpu(), drawn.log_probs.cpu(), drawn.drawn_log_probs.cpu()
            return [Candidate(*one) for one in zip(*parts, strict=True)]

    def _decode(self, codes: Tensor) -> Tensor:
        """(n, Q, h, w) -> (n, 3, H, W)."""
        # Convolutions of a larger batch add up in another order, which can move a pixel by 1/255: on a CPU, where that
        # costs little, pictures are decoded one by one, so that each is the same in any company.
        together = 1 if codes.device.type == "cpu" else 16
        return torch.cat([self.image_tokenizer.decode(some) for some in codes.split(together)])

    def _encode(self, image: Image.Image) -> Tensor:
        """The codes (1, Q, h, w) of a picture, scaled and cut to the tokenizer's size."""
        pixels = to_tensor(fit(image.convert("RGB"), self.image_tokenizer.image_size))
        return self.image_tokenizer.encode(pixels[None].to(self._device))

    def _scorer(self, prompts: Sequence[str], prior: Prior, reranker: Reranker) -> Scorer:
        """What early pruning compares candidates by: the score of the picture, the missing codes filled in."""

        def score(number: int, codes: Tensor) -> Tensor:
            filled = prior.grid(fill(codes, prior.code_shape))
            return reranker.score(prompts[number], self._decode(filled), filled)

        return score

    # Settings of a call ----------------------------------------------------------------------------------------------

    def _prefix(self, prompt: str, name: str, reranker: Reranker | None = None) -> Tensor:
        """One prompt's prefix (1, P). Only of our rerankers it is known what they leave out."""
        unscored = reranker.left_out(prompt) if isinstance(reranker, ClipReranker) else ""
        try:
            prefix = prompt_prefix(self.prior, prompt, self.segmentation_tokenizer)
            warn_of_cut(name, {"reranker": unscored})
            return prefix
        except PromptTooLong:
            pass
        except InputError as error:
            raise InputError(f"{name}: {error}" if name != "the prompt" else str(error)) from None
        if self.prior.text_tokenizer is not None:  # a cut between characters that cannot be seen would be another one
            prompt = self.prior.text_tokenizer.visible(prompt)
        fits, end = 0, len(prompt)  # the longest start that the prior reads lies between them
        while end - fits > 1:
            middle = (fits + end) // 2
            try:
                self.prior.prefix([prompt[:middle]])
                fits = middle
            except PromptTooLong:
                end = middle
        warn_of_cut(name, {"prior": prompt[fits:], "reranker": unscored})
        return self.prior.prefix([prompt[:fits]])

    def _null(self, negative_prompt: str | None, sampling: Sampling) -> Tensor | None:
        """The prefix (1, P) that takes the place of the null one, None for no change."""
        if negative_prompt:
            check_prompt(negative_prompt, "negative prompt")
            if not sampling.guided:
                raise InputError(
                    "a negative prompt is what guidance steers away from, and guidance_scale 1 is none; set another"
                )
            return self._prefix(negative_prompt, "the negative prompt")
        if sampling.guided and self.prior.config.condition_dropout == 0:
            warnings.warn(
                "the prior was trained without condition_dropout and never drew without a prompt, so that guidance may "
                "lead anywhere; set guidance_scale 1, or give a negative prompt",
                InputWarning,
                stacklevel=2,
            )
        return None

    def _gaps(self, codes: Tensor) -> GapsPrior:
        """The prior of what is MISSING among these codes (T,). Raises InputError when they are not a picture's."""
        if codes.shape != (self.prior.length,) or codes.dtype != torch.int64:
            raise InputError(
                f"known_codes must be {self.prior.length} whole numbers, {MISSING} for those to draw, got "
                f"{tuple(codes.shape)} of {codes.dtype}"
            )
        grid = self.prior.grid(codes[None])[0]  # (Q, h, w)
        missing = grid == MISSING
        if (missing.any(0) != missing.all(0)).any():
            raise InputError("known_codes must have all codebooks of a position or none of them")
        return GapsPrior(self.prior, grid, ~missing[0])

    def _plan(
        self, budget: float | None, by: str, candidates: int, length: int, given: int, sampling: Sampling
    ) -> Plan | None:
        """How candidates are pruned, None for not at all."""
        if by not in ("likelihood", "reranker"):
            raise InputError(f"prune_by must be 'likelihood' or 'reranker', got '{by}'")
        if budget is None or budget == 1:
            return None
        if not isinstance(budget, float | int) or not 0 < budget < 1:
            raise InputError(f"candidate_budget must be above 0 and at most 1, got {budget}")
        if by == "reranker" and self.reranker is None:
            raise InputError("there is no reranker to prune by; load one, or prune_by the likelihood")
        if by == "likelihood" and not sampling.guided:
            raise InputError(NEEDS_GUIDANCE)
        return plan_pruning(candidates, length, budget, given)

    # Memory and devices ----------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return next(self.prior.parameters()).device

    def _rows(self, prompts: int, candidates: int, sampling: Sampling, batch_size: int | None) -> int:
        """How many candidates to draw at once. Raises InputError when those of one prompt do not fit in memory."""
        device, row = self._device, self._row_bytes(sampling)
        wanted = min(MOST_ROWS if batch_size is None else whole_number("batch_size", batch_size), prompts * candidates)
        least = row * (1 if batch_size is None else wanted)
        pictures = candidates * self._picture_bytes()  # of the prompt under way
        self._check_memory(pictures, candidates, prompts)
        self._check_memory(least + (device.type == "cpu") * pictures, candidates, prompts, device)
        return wanted if batch_size is not None else max(1, min(wanted, int(free_memory(device) / 2 // row)))

    def _check_memory(self, need: int, candidates: int, prompts: int, place: torch.device = CPU) -> None:
        """Raises InputError unless `need` bytes are free."""
        there = free_memory(place)
        if need > there:
            raise InputError(
                f"{candidates:,} candidates for {prompts:,} prompts need about {need / 1e9:,.1f} GB of memory, and "
                f"{there / 1e9:,.1f} GB are free; ask for fewer"
            )

    def _row_bytes(self, sampling: Sampling) -> int:
        """Roughly what drawing and decoding one more candidate takes: keys and values, logits, pixels."""
        numbers = self.prior.cache_numbers() + 8 * self.prior.codebook_size
        guided = 2 if sampling.guided else 1
        return 4 * (guided * numbers + 3 * self.image_tokenizer.image_size**2 * 8)

    def _picture_bytes(self) -> int:
        """A candidate as it is kept: 8-bit pixels, int64 codes, and what Python adds."""
        return 3 * self.image_tokenizer.image_size**2 + 8 * self.prior.length + 1000


def fill(codes: Tensor, code_shape: tuple[int, int, int]) -> Tensor:
    """The first codes of images (n, m), m >= 1, as whole ones (n, T): what is missing repeats the row above it.

    The first row, where that is not whole, repeats its last position, and a position its first codebook's code.
    """
    codebooks, height, width = code_shape
    length, row = math.prod(code_shape), width * codebooks
    filled = torch.cat([codes, codes.new_zeros(len(codes), length - codes.shape[1])], dim=1)
    for position in range(codes.shape[1], length):
        back = row if position >= row else min(codebooks, position)
        filled[:, position] = filled[:, position - back]
    return filled


def whole_numbers(name: str, codes: Tensor | Sequence[int] | None) -> Tensor:
    """Codes of a caller as a tensor, none for None. Raises InputError for what are no numbers."""
    if isinstance(codes, Tensor):
        return codes
    try:
        made = torch.tensor([] if codes is None else list(codes))
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name} must be whole numbers") from None
    return made if len(made) else made.long()  # an empty list makes floats


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


def _best_first(candidate: Candidate) -> float:
    return 0 if candidate.score is None else -candidate.score


def _generated(candidates: Sequence[Candidate], job: Job) -> Generated:
    """What is returned of a prompt."""
    images, scores, seeds, codes, log_probs, drawn_log_probs = zip(*candidates, strict=True)
    return Generated(
        list(images),
        None if job.reranker is None else list(scores),
        list(seeds),
        torch.stack(codes),
        torch.stack(log_probs) if job.scored else None,
        torch.stack(drawn_log_probs) if job.scored else None,
    )
