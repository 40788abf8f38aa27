"""Early pruning of candidates: what a request's budget means, and how an image is judged before it is whole."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipelines.bundle import Bundle
from pipelines.request import Request
from stage2_prior.base import Prior
from stage2_prior.sampling.prune import NEEDS_GUIDANCE, Plan, Scorer, plan_pruning
from tessera.errors import InputError


def plan_of(request: Request, bundle: Bundle, length: int, given: int) -> Plan | None:
    """How candidates of `length` codes, the first `given`, are pruned; None for not at all. Raises InputError."""
    if request.candidate_budget is None:
        return None
    assert request.sampling is not None
    if request.prune_by == "reranker" and bundle.reranker is None:
        raise InputError("there is no reranker to prune by; load one, or prune_by the likelihood")
    if request.prune_by == "likelihood" and not request.sampling.guided:
        raise InputError(NEEDS_GUIDANCE)
    return plan_pruning(len(request.candidate_seeds), length, request.candidate_budget, given)


def count_finished(request: Request, bundle: Bundle) -> int:
    """How many candidates of a prompt are finished."""
    candidates = len(request.candidate_seeds)
    if request.candidate_budget is None:
        return candidates
    return plan_pruning(candidates, bundle.prior.length, request.candidate_budget).survivors


def image_scorer(prompts: Sequence[str], prior: Prior, bundle: Bundle) -> Scorer:
    """Compares unfinished candidates by the reranker's score of the image, the missing codes filled in."""
    reranker = bundle.reranker
    assert reranker is not None

    def scorer(number: int, codes: Tensor) -> Tensor:
        filled = prior.grid(fill(codes, prior.code_shape))
        return reranker.score(prompts[number], bundle.decode(filled), filled)

    return scorer


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
