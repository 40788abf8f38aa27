"""How well a prior predicts codes: `tessera evaluate prior MODEL CODES`, in nats on images it has not seen."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from stage2_prior.base import Prior
from stage2_prior.codes import Codes
from stage2_prior.conditions import batch_prefix, condition_of
from stage2_prior.gpt import GPTPrior
from stage2_prior.load import load_prior
from stage2_prior.sampling.settings import guide
from tessera.errors import InputError
from tessera.text import PAD


@torch.inference_mode()
def evaluate(
    model: str | Path, codes: str | Path, guidance_scale: float | None = None, batch_size: int = 32
) -> dict[str, Any]:
    """Mean losses over all images of a folder of codes, each with its condition: its first caption, cut where it is
    too long, or its class or segmentation map.

    `image` is nats a code given the condition, `image_by_depth` the same for each codebook, `image_without_caption`
    what it is given none, `image_guided` under the distribution that sampling with `guidance_scale` draws from; `text`
    is nats a text token, the end of the text among them (None where no image has a caption, or for another prior than
    the GPT). Raises InputError when the codes are not those of the prior's image tokenizer, or have not its condition.
    """
    source, prior = Codes(codes), load_prior(model)
    if prior.config.image_tokenizer_fingerprint not in ("", source.meta.tokenizer_fingerprint):
        raise InputError(
            f"the prior in {model} draws codes of tokenizer {prior.config.image_tokenizer_fingerprint}, {codes} holds "
            f"codes of {source.meta.tokenizer_fingerprint}; encode the pictures with the prior's own tokenizer"
        )
    _check_condition(model, prior, source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prior.to(device)
    captioned, alone, guided = (torch.zeros(prior.num_codebooks, dtype=torch.float64) for _ in range(3))
    text, tokens, start = 0.0, 0, time.perf_counter()
    for first in tqdm(range(0, len(source), batch_size), unit="batch", disable=not sys.stderr.isatty()):
        rows = source.read(range(first, min(first + batch_size, len(source)))).to(device)  # (B, T)
        captions = [(choices or ("",))[0] for choices in source.captions[first : first + batch_size]]
        prefix = batch_prefix(prior, source.batch(range(first, first + len(rows)), captions))  # (B, P)
        predictions = prior.predict(prefix, rows)
        unconditional = prior(prior.null_prefix(len(rows)), rows)
        captioned += by_depth(predictions.codes, rows, prior.num_codebooks)
        alone += by_depth(unconditional, rows, prior.num_codebooks)
        if guidance_scale is not None:
            mixed = guide(predictions.codes, unconditional, guidance_scale)
            guided += by_depth(mixed, rows, prior.num_codebooks)
        if isinstance(prior, GPTPrior) and predictions.text is not None:
            targets = prefix[:, 1:]
            counted = (prefix[:, :-1] != PAD) & (prefix[:, 1:2] != PAD)  # the first <pad> says that the text ends
            text += float(nats(predictions.text, targets)[counted].double().sum())
            tokens += int(counted.sum())
    seconds = time.perf_counter() - start
    positions = len(source) * prior.length // prior.num_codebooks
    report: dict[str, Any] = {
        "model": str(model),
        "codes": str(codes),
        "pictures": len(source),
        "image": round(float(captioned.mean()) / positions, 4),
        "image_by_depth": [round(float(nat) / positions, 4) for nat in captioned],
        "image_without_caption": round(float(alone.mean()) / positions, 4),
    }
    if guidance_scale is not None:
        report |= {"guidance_scale": guidance_scale, "image_guided": round(float(guided.mean()) / positions, 4)}
    return report | {
        "text": round(text / tokens, 4) if tokens else None,
        "images_per_second": round(len(source) / seconds, 1),
    }


def _check_condition(model: str | Path, prior: Prior, source: Codes) -> None:
    """Raises InputError unless the codes have the condition that the prior draws from, of the same classes or maps."""
    if prior.condition == "text":
        if prior.text_tokenizer is None:
            raise InputError(f"the prior in {model} has no text tokenizer, so no captions can be read with it")
        return
    wanted = condition_of(prior.condition, source, None)
    if any(getattr(prior.config, key, value) != value for key, value in wanted.items()):
        raise InputError(
            f"the prior in {model} was trained with other classes or other codes of maps than {source.folder} has; "
            "encode with the tokenizers and the labels that it was trained with"
        )


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    """(..., K) logits and (...) int64 -> -log p of each target, (...)."""
    return -logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def by_depth(logits: Tensor, codes: Tensor, num_codebooks: int) -> Tensor:
    """Logits (B, T, K) and codes (B, T) -> the sum of their nats for each codebook (Q,), in double precision."""
    return nats(logits, codes).double().view(-1, num_codebooks).sum(0).cpu()
