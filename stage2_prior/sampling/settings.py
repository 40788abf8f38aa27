"""How codes are sampled: the settings, and what each does to the logits.

The order is fixed: guidance and its plausibility, temperature, top-k, top-p, min-p, each on what the one before left.
Only the k likeliest count towards p, and min-p is a share of the likeliest code's probability, which neither top-k nor
top-p changes.
"""

import math
from typing import Literal, assert_never

import torch
from pydantic import Field
from torch import Tensor

from tessera.config import Config

Precision = Literal["float32", "bfloat16", "int8", "fp8"]  # that an engine keeps a prior's weights in


class Sampling(Config):
    temperature: float = Field(1.0, gt=0)  # below 1 sharpens, above 1 flattens
    top_k: int | None = Field(None, ge=1)  # only the k likeliest codes; all of them from the codebook's size on
    top_p: float | None = Field(None, gt=0, le=1)  # only the likeliest codes that together reach probability p
    min_p: float | None = Field(None, gt=0, le=1)  # only codes of at least p times the probability of the likeliest
    guidance_scale: float = Field(1.0, ge=0)  # 1 is the plain conditional distribution
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"  # see `guidance_at`
    plausibility: float | None = Field(None, gt=0, le=1)  # guidance chooses among codes that are likely without it

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1


def guidance_at(sampling: Sampling, position: int, length: int) -> float:
    """The guidance scale of code `position` of `length`.

    Constant, or moving from 1 at the first code to the whole scale at the last: along a line (Chang et al. 2023,
    section 2.7) or half a cosine wave (Wang et al. 2024), so that early codes vary freely and late ones keep to the
    prompt.
    """
    share = position / max(1, length - 1)
    match sampling.guidance_schedule:
        case "constant":
            return sampling.guidance_scale
        case "linear":
            return 1 + (sampling.guidance_scale - 1) * share
        case "cosine":
            return 1 + (sampling.guidance_scale - 1) * (1 - math.cos(math.pi * share)) / 2
        case _:
            assert_never(sampling.guidance_schedule)


def guide(
    conditional: Tensor, unconditional: Tensor, scale: float | Tensor, plausibility: float | None = None
) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022) on log-probabilities: both (N, K) logits -> (N, K).

    A scale of each row is (N, 1). Codes of less than `plausibility` times the conditional probability of the
    conditionally likeliest get -inf: where both probabilities are tiny their ratio is noise, and a large scale would
    sample by that (Li et al. 2023, "Contrastive decoding", equation 2).
    """
    conditional, unconditional = conditional.log_softmax(-1), unconditional.log_softmax(-1)
    guided = unconditional + scale * (conditional - unconditional)
    return guided if plausibility is None else guided.masked_fill(_below(conditional, plausibility), -torch.inf)


def _below(logits: Tensor, share: float) -> Tensor:
    """Which codes have less than `share` of the likeliest one's probability, (N, K) bool."""
    return logits < logits.amax(-1, keepdim=True) + math.log(share)


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, then top-k, top-p (Holtzman et al. 2020) and min-p (Nguyen et al. 2024).

    (N, K) -> (N, K) with -inf where nothing is sampled; the likeliest code always stays.
    """
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all likelier codes
        drop = (before >= sampling.top_p).scatter(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if sampling.min_p is not None:
        logits = logits.masked_fill(_below(logits, sampling.min_p), -torch.inf)
    return logits
