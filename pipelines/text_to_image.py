"""`TextToImagePipeline`: a bundle, an engine for its prior, and LoRAs; what a call does stands in `generate.py`."""

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipelines.bundle import Bundle, load_bundle, save_bundle
from pipelines.edit import codes_of_top, codes_outside
from pipelines.generate import Generated, Progress, generate
from pipelines.memory import check_memory, image_bytes
from pipelines.prefix import prompt_prefixes
from pipelines.pruning import count_finished
from pipelines.request import Request, check_likelihood_weight, keywords, read_prompts
from rerank import ClipReranker, Reranker
from stage1_tokenizer import Autoencoder
from stage2_prior import Sampling
from stage2_prior.base import Prior
from stage2_prior.lora import Loras
from stage2_prior.sampling import Engine, make_engine
from stage2_prior.sampling.selection import check_precision
from stage2_prior.sampling.settings import Precision
from tessera.errors import InputError
from tessera.hardware import find_device


class TextToImagePipeline:
    """What `from_pretrained` loads and a call generates with."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.loras = Loras(bundle.prior)
        self._precision: Precision | None = None
        self._engine: Engine | None = None

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
        return cls(load_bundle(name, device=find_device(device), dtype=dtype, rerank=rerank))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the pipeline as a bundle. Raises InputError for LoRAs that are not part of the prior."""
        if self.loras.applied:
            raise InputError(
                "the pipeline has LoRAs that are not fused; call fuse_lora() or unload_lora_weights() first"
            )
        if not isinstance(self.reranker, ClipReranker | None):
            raise InputError(f"a {type(self.reranker).__name__} cannot be saved in a bundle, only a ClipReranker can")
        save_bundle(folder, self.bundle)

    # Generating ------------------------------------------------------------------------------------------------------

    def __call__(self, prompt: Any, *, progress: Progress | None = None, **settings: Any) -> Generated:
        """Samples `num_candidates` (16) for each prompt and returns the `num_images_per_prompt` (4) best, best first.

        A prompt is text, or, where the prior is conditioned on these, a `ClassLabel` or `SegmentationMap` of
        conditions.py; a list of prompts, or a whole `Request`, is fine too. Candidate i has seed `seed + i`, or
        `seeds[i]`; an image depends on prompt, seed and sampling alone. Settings of `Sampling` (temperature, top_k,
        top_p, min_p, guidance_scale, guidance_schedule, plausibility) that are not given are `sampling`'s, by default
        the bundle's; top_k 0 takes all codes, as do top_p 1, min_p 0 and plausibility 0. `negative_prompt` takes the
        place of the empty prompt that guidance steers away from. `first_codes` (n,) are the first codes of every image,
        as `codes_of_top` gives them; the rest is sampled. `known_codes` (T,) are all codes of every image, -1 for those
        that are missing, as `codes_outside` gives them. Images are ordered by the reranker's score plus
        `likelihood_weight`, by default the bundle's, times log p(codes | prompt) in nats, the prior's own without
        guidance or filters; `scores` are these sums. `candidate_budget` (below 1) is the share of the codes of all
        candidates that may be sampled: the least promising, by the prior's likelihood or by the reranker (`prune_by`),
        are dropped part-way, see `stage2_prior/sampling/prune.py`. `log_probs` returns those of the codes. `batch_size`
        candidates are sampled at once, by default as many as fit in memory up to 64. Everything is checked before the
        first is sampled.

        Warns (InputWarning) of a prompt that is too long for prior or reranker and cut, saying what was left out, and
        of guidance on a prior that was trained without condition dropout. Raises InputError: a prompt that is empty,
        binary or without words; unknown settings; counts, seeds, codes, sampling or weights out of range; a negative
        prompt without guidance; more than fits in memory.
        """
        request = self.request(prompt, **settings)
        ranked = self.stream(request, progress=progress)
        keep = request.kept(count_finished(request, self.bundle))
        count, candidates = len(request.prompts), len(request.candidate_seeds)
        check_memory((count * keep + candidates) * image_bytes(self.bundle), candidates, count)
        prompts = list(ranked)

        def best(name: str) -> list[Any]:
            """The first `keep` of each prompt, one after another."""
            return [part for one in prompts for part in getattr(one, name)[:keep]]

        return Generated(
            best("images"),
            None if prompts[0].scores is None else best("scores"),
            best("seeds"),
            torch.stack(best("codes")),
            torch.stack(best("log_probs")) if request.log_probs else None,
            torch.stack(best("drawn_log_probs")) if request.log_probs else None,
        )

    def stream(self, prompt: Any, *, progress: Progress | None = None, **settings: Any) -> Iterator[Generated]:
        """All finished candidates of each prompt, best first, as soon as they are there, while the next are sampled.

        For many prompts; arguments, warnings and errors as of a call, before the first is sampled.
        """
        return generate(self.bundle, lambda: self.engine, self.request(prompt, **settings), progress)

    def request(self, prompt: Any, **settings: Any) -> Request:
        """What a call with these arguments asks for. Raises InputError."""
        if isinstance(prompt, Request):
            if settings:
                raise InputError(f"a Request has all settings; leave {next(iter(settings))} out")
            return prompt
        return Request.make(prompt, **settings)

    def settings(self, sampling: Sampling | None = None, **changes: Any) -> Sampling:
        """`sampling` (the bundle's) with those `changes` that are not None. Raises InputError out of range."""
        return Request.make("x", sampling=sampling, **changes).sampled_with(self.sampling)

    # Editing ---------------------------------------------------------------------------------------------------------

    def infill(self, image: Image.Image, mask: Image.Image, prompt: Any, **settings: Any) -> Generated:
        """Samples the white parts of an image's mask anew as the prompt says and keeps the codes of the others.

        Also called inpainting. The mask is of the image's size, see `codes_outside`; `settings` are a call's. Raises
        InputError as both do, and when the prior samples in one order only.
        """
        return self(prompt, known_codes=self.codes_outside(image, mask), **settings)

    def codes_of_top(self, image: Image.Image, rows: int | None = None) -> Tensor:
        """See `edit.codes_of_top`."""
        return codes_of_top(self.bundle, image, rows)

    def codes_outside(self, image: Image.Image, mask: Image.Image) -> Tensor:
        """See `edit.codes_outside`."""
        return codes_outside(self.bundle, image, mask)

    def prefixes(self, prompts: Sequence[Any]) -> Tensor:
        """What the prior reads of prompts, (prompts, P); a warning shows what is cut off."""
        return prompt_prefixes(read_prompts(prompts), self.bundle)

    # LoRAs and the engine --------------------------------------------------------------------------------------------

    def load_lora_weights(self, folder: str | Path, weight: float = 1.0) -> None:
        """Generates with `weight` times the LoRA in a folder or of a hub name from now on, beside those loaded before.

        Raises InputError when it cannot be read, or was trained on another prior.
        """
        try:
            self.loras.add(folder, weight)
        finally:
            self._refresh()

    def unload_lora_weights(self) -> None:
        """Generates without LoRAs again, bit by bit as before; those that were fused stay."""
        self.loras.remove()
        self._refresh()

    def fuse_lora(self) -> None:
        """Makes the LoRAs part of the prior for good, so that it can be saved, or be the base of another."""
        if self.loras.applied:
            self.bundle.fingerprint = None  # it generates other images than its bundle
        self.loras.fuse()

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

    # The bundle's parts ----------------------------------------------------------------------------------------------

    @property
    def image_tokenizer(self) -> Autoencoder:
        return self.bundle.image_tokenizer

    @property
    def prior(self) -> Prior:
        return self.bundle.prior

    @property
    def reranker(self) -> Reranker | None:
        return self.bundle.reranker

    @property
    def sampling(self) -> Sampling:
        """What a call samples with unless told otherwise."""
        return self.bundle.sampling

    @property
    def likelihood_weight(self) -> float:
        """Of log p(codes | prompt) beside the reranker's score, unless a call is told otherwise."""
        return self.bundle.likelihood_weight

    @likelihood_weight.setter
    def likelihood_weight(self, weight: float) -> None:
        self.bundle.likelihood_weight = check_likelihood_weight(weight)

    @property
    def segmentation_tokenizer(self) -> Autoencoder | None:
        return self.bundle.segmentation_tokenizer

    @property
    def fingerprint(self) -> str | None:
        """The bundle's; None when the parts are not those of a bundle on disk."""
        return self.bundle.fingerprint


def _with_settings(method: Any) -> None:
    """Gives a method the settings of a `Request` in place of `**settings` in its signature, for help and notebooks."""
    signature = inspect.signature(method)
    given = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    fields = {**Sampling.model_fields, **Request.model_fields}
    settings = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=fields[name].default if name in Request.model_fields else None,
            annotation=fields[name].annotation,
        )
        for name in keywords()
    ]
    method.__signature__ = signature.replace(parameters=[*given, *settings])


_with_settings(TextToImagePipeline.__call__)
_with_settings(TextToImagePipeline.stream)
