"""Filling what is missing from an image: a prior in random order reads the known codes first and draws the rest.

So every code is drawn with all known ones in view, on both sides. A prior that reads in raster order can do the same
where the known codes come first.

Letters: R prefixes, N images, P prefix, Q codebooks, h w code grid, S = h·w positions, K codebook size.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stage2_prior.base import Cache, Prior, flatten_codes, unflatten_codes
from stage2_prior.gpt import GPTPrior
from stage2_prior.sampling import Sampling, sample
from tessera.errors import InputError

ONLY_ROWS = (
    "this prior samples in raster order and sees nothing that comes later; to fill in missing codes train a GPT with "
    "model.order=random, or keep an image's upper rows alone (--top-of, first_codes)"
)


def infill(
    prior: Prior,
    prefix: Tensor,
    codes: Tensor,
    known: Tensor,
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Keeps the known codes of an image and draws the others, once for each seed: (N, Q, h, w) int64.

    `codes` (Q, h, w) int64, of which those at positions that are not `known` (h, w) bool are not looked at; `prefix`,
    `seeds`, `sampling` and `progress` as of `sample`. Raises InputError when the codes are not the prior's, nothing is
    missing, the prior is no GPT, or it reads in raster order and something known comes after something missing.
    """
    infilling = InfillPrior(prior, codes, known)
    return infilling.grid(sample(infilling, prefix, seeds, sampling, progress))


class InfillPrior(Prior):
    """The distribution of an image's missing codes, in raster order, given its known ones: itself a prior."""

    def __init__(self, prior: Prior, codes: Tensor, known: Tensor) -> None:
        """`codes` and `known` as of `infill`, which says what is raised."""
        super().__init__(prior.config, prior.text_tokenizer)
        if not isinstance(prior, GPTPrior):
            raise InputError(ONLY_ROWS)
        _check(prior, codes, known)
        device = prior.text_embedding.weight.device
        self.prior = prior
        missing = int((~known).sum())
        self.code_shape, self.length = (self.num_codebooks, 1, missing), self.num_codebooks * missing
        self.prefix_length = prior.prefix_length
        self.order = (~known).flatten().to(device).int().argsort(stable=True)  # (S,), the known positions first
        self.given, self.missing = self.order[:-missing], self.order[-missing:]
        self.positions = flatten_codes(codes.unsqueeze(0)).to(device).view(-1, self.num_codebooks)  # (S, Q)

    def text_prefix(self, text: Sequence[str]) -> Tensor:
        return self.prior.text_prefix(text)

    def null_prefix(self, rows: int) -> Tensor:
        return self.prior.null_prefix(rows)

    def unconditional(self, prefix: Tensor) -> Tensor:
        return self.prior.unconditional(prefix)

    def forward(self, prefix: Tensor, codes: Tensor) -> Tensor:
        logits = self.prior(prefix, self.whole(codes), self._order(len(prefix)))
        by_position = logits.unflatten(1, (-1, self.num_codebooks))
        return by_position[:, self.missing].flatten(1, 2)

    def prefill(self, prefix: Tensor, length: int) -> tuple[Tensor, Cache]:
        rows, known = len(prefix), self.positions[self.given].flatten()
        return self.prior.prefill(prefix, len(known) + length, order=self._order(rows), known=known.expand(rows, -1))

    def step(self, codes: Tensor, cache: Cache) -> Tensor:
        return self.prior.step(codes, cache)

    def cache_numbers(self) -> int:
        return self.prior.cache_numbers()

    def whole(self, codes: Tensor) -> Tensor:
        """Missing codes (N, self.length) -> those of the whole image, known ones in their places, (N, S·Q)."""
        positions = self.positions.repeat(len(codes), 1, 1)  # (N, S, Q)
        positions[:, self.missing] = codes.view(len(codes), -1, self.num_codebooks)
        return positions.flatten(1)

    def grid(self, sequence: Tensor) -> Tensor:
        return unflatten_codes(self.whole(sequence), self.prior.code_shape)

    def _order(self, rows: int) -> Tensor | None:
        return self.order.expand(rows, -1) if self.prior.config.order == "random" else None


def _check(prior: GPTPrior, codes: Tensor, known: Tensor) -> None:
    if (
        tuple(codes.shape) != prior.code_shape
        or tuple(known.shape) != prior.code_shape[1:]
        or known.dtype != torch.bool
    ):
        raise InputError(
            f"codes must be {prior.code_shape} and known {prior.code_shape[1:]} of true and false, got "
            f"{tuple(codes.shape)} and {tuple(known.shape)} of {known.dtype}"
        )
    if bool(known.all()):
        raise InputError("all codes are known, so there is nothing to draw; leave something out")
    given = codes[:, known]
    if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < prior.codebook_size:
        raise InputError(f"codes must be in [0, {prior.codebook_size}), got {int(given.min())} to {int(given.max())}")
    first = int((~known).flatten().int().argmax())
    if prior.config.order == "raster" and bool(known.flatten()[first:].any()):
        raise InputError(ONLY_ROWS)
