"""The contract of what sits between encoder and decoder.

Letters: B batch, D latent channels, h w latent grid, Q codebooks, K codebook size. The grid of the codes is that of
the latents for every kind but one: see `stride`.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tessera.errors import InputError
from tessera.metrics import code_counts


class Bottlenecked(NamedTuple):
    latents: Tensor  # (B, D, h, w), what the decoder sees; gradients flow to the encoder
    codes: Tensor | None  # (B, Q, h / stride, w / stride) int64 in [0, codebook_size); None when continuous
    loss: Tensor  # scalar: codebook, commitment, KL or entropy terms, weighted; 0 when the kind has none


class Bottleneck(nn.Module, ABC):
    """Latents in, latents and codes out."""

    codebook_size: int | None  # K; None when continuous
    num_codebooks: int  # Q; 0 when continuous
    stride: int = 1  # positions of the latents for one position of the codes, each side

    @property
    def codebook_of(self) -> tuple[int, ...]:
        """Which codebook each of the Q codes of a position is of: a codebook each, for every kind but one."""
        return tuple(range(self.num_codebooks))

    def count(self, codes: Tensor) -> Tensor:
        """How often each code of each codebook occurs: (B, Q, h / stride, w / stride) -> (codebooks, K) int64."""
        assert self.codebook_size is not None
        books = torch.tensor(self.codebook_of, device=codes.device)
        counts = codes.new_zeros(int(books.max()) + 1, self.codebook_size)
        return counts.index_add_(0, books, code_counts(codes, self.codebook_size))

    @abstractmethod
    def forward(self, z: Tensor) -> Bottlenecked:
        """(B, D, h, w) float32 -> the decoder's latents, their codes, the loss. In train mode codebooks may move."""

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """(B, Q, h / stride, w / stride) -> (B, D, h, w): `lookup(forward(z).codes)` equals `forward(z).latents`.

        For codes of eval mode, where nothing moves or is drawn. Raises InputError when continuous.
        """


class ContinuousBottleneck(Bottleneck):
    """A bottleneck without codes."""

    codebook_size = None
    num_codebooks = 0

    def lookup(self, codes: Tensor) -> Tensor:
        raise InputError("a continuous bottleneck has no codes to look up; hand its latents to the decoder")
