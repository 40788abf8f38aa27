"""Prompts as what the prior reads; the end of a prompt that is too long is cut off, and a warning shows it."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import assert_never

import torch
from torch import Tensor

from pipelines.bundle import Bundle
from pipelines.request import ClassLabel, NoPrompt, Prompt, Request, SegmentationMap, TextPrompt
from rerank import ClipReranker, Reranker
from stage1_tokenizer import Autoencoder
from stage2_prior.base import Prior, PromptTooLong
from tessera.errors import InputError, InputWarning
from tessera.images import read_map

SHOWN_OF_CUT = 120  # characters of what was cut off a prompt


def prompt_prefixes(prompts: Sequence[Prompt], bundle: Bundle, reranker: Reranker | None = None) -> Tensor:
    """What the prior reads, (prompts, P). Of a prompt that is too long a warning shows what is left out.

    Given the reranker that will score, the warning is of what that leaves out as well.
    """
    several = len(prompts) > 1
    return torch.cat(
        [
            _prefix(prompt, f"prompt {number}" if several else "the prompt", bundle, reranker)
            for number, prompt in enumerate(prompts, 1)
        ]
    )


def negative_prefix(request: Request, bundle: Bundle) -> Tensor | None:
    """The prefix (1, P) that takes the place of the null one, None for no change. Raises InputError without guidance;
    warns (InputWarning) of guidance on a prior that was trained without condition dropout."""
    assert request.sampling is not None
    if request.negative_prompt:
        if not request.sampling.guided:
            raise InputError(
                "a negative prompt is what guidance steers away from, and guidance_scale 1 is none; set another"
            )
        return _prefix(TextPrompt(request.negative_prompt), "the negative prompt", bundle, None)
    if request.sampling.guided and bundle.prior.config.condition_dropout == 0:
        warnings.warn(
            "the prior was trained without condition_dropout and never sampled without a prompt, so that guidance may "
            "lead anywhere; set guidance_scale 1, or give a negative prompt",
            InputWarning,
            stacklevel=2,
        )
    return None


def _prefix(prompt: Prompt, name: str, bundle: Bundle, reranker: Reranker | None) -> Tensor:
    """One prompt's prefix (1, P). Only of our rerankers it is known what they leave out."""
    prior, text = bundle.prior, str(prompt)
    unscored = reranker.left_out(text) if isinstance(reranker, ClipReranker) else ""
    try:
        prefix = prompt_prefix(prior, prompt, bundle.segmentation_tokenizer)
        warn_of_cut(name, {"reranker": unscored})
        return prefix
    except PromptTooLong:
        pass
    except InputError as error:
        raise InputError(f"{name}: {error}" if name != "the prompt" else str(error)) from None
    if prior.text_tokenizer is not None:  # a cut between characters that cannot be seen would be another one
        text = prior.text_tokenizer.visible(text)
    fits, end = 0, len(text)  # the longest start that the prior reads lies between them
    while end - fits > 1:
        middle = (fits + end) // 2
        try:
            prior.prefix([text[:middle]])
            fits = middle
        except PromptTooLong:
            end = middle
    warn_of_cut(name, {"prior": text[fits:], "reranker": unscored})
    return prior.prefix([text[:fits]])


def prompt_prefix(prior: Prior, prompt: Prompt, segmentation_tokenizer: Autoencoder | None) -> Tensor:
    """What the prior reads of one prompt, (1, P). Raises InputError when it is not conditioned on such a one."""
    match prompt:
        case SegmentationMap():
            if segmentation_tokenizer is None:
                return prior.prefix(segmentation=torch.empty(1, 0, 0, 0))  # says what it is conditioned on instead
            return prior.prefix(segmentation=map_codes(prompt.path, segmentation_tokenizer))
        case ClassLabel():
            of_classes = prior.condition == "class"  # if not, `prefix` says what it is conditioned on instead
            return prior.prefix(classes=[prior.class_number(str(prompt.label))] if of_classes else [])
        case NoPrompt():
            return prior.prefix()
        case TextPrompt(text=text):
            pass
        case _:
            assert_never(prompt)
    match prior.condition:
        case "text":
            return prior.prefix([text])
        case "class":
            return prior.prefix(classes=[prior.class_number(text.strip().removeprefix("class ").strip())])
        case "segmentation":
            raise InputError(
                f"this prior draws from segmentation maps, give the file of one with --segmentation, got '{text:.60}'"
            )
        case "none":
            if text != str(NoPrompt()):
                raise InputError(f"this prior draws from no condition, say --unconditional, got '{text:.60}'")
            return prior.prefix()


def map_codes(path: Path, tokenizer: Autoencoder) -> Tensor:
    """The codes (1, Q, h, w) of a map, see `read_map`."""
    pixels = read_map(path, tokenizer.image_size, tokenizer.config.trunk.image_channels)
    return tokenizer.encode(pixels[None].to(next(tokenizer.parameters()).device))


def warn_of_cut(name: str, left_out: dict[str, str]) -> None:
    """One sentence (InputWarning) about the end of a prompt that each reader, such as the prior, leaves out, if any."""
    parts = [(reader, " ".join(cut.split())) for reader, cut in left_out.items() if cut]
    if not parts:
        return
    (first, cut), *others = parts
    sentence = f"{name} is longer than the {first} reads; left out is '{_start(cut)}'"
    sentence += "".join(f", and by the {reader} '{_start(cut)}'" for reader, cut in others)
    warnings.warn(sentence, InputWarning, stacklevel=3)


def _start(text: str) -> str:
    return text if len(text) <= SHOWN_OF_CUT else f"{text[:SHOWN_OF_CUT]}... ({len(text):,} characters)"
