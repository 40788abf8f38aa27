"""How codes are drawn: the settings, and what each does to the logits."""

import torch
from pydantic import Field
from torch import Tensor

from common.config import Config


class Sampling(Config):
    temperature: float = Field(1.0, gt=0)  # below 1 sharpens, above 1 flattens
    top_k: int | None = Field(None, ge=1)  # only the k likeliest codes
    top_p: float | None = Field(None, gt=0, le=1)  # only the likeliest codes that together reach probability p
    guidance_scale: float = Field(1.0, ge=0)  # 1 is the plain conditional distribution


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022) on log-probabilities: both (N, K) logits -> (N, K)."""
    conditional, unconditional = conditional.log_softmax(-1), unconditional.log_softmax(-1)
    return unconditional + scale * (conditional - unconditional)


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, then top-k, then top-p (Holtzman et al. 2020): (N, K) -> (N, K) with -inf where nothing is drawn."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all likelier codes
        drop = (before >= sampling.top_p).scatter(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits
