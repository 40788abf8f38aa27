"""The contract of what sits between encoder and decoder."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn


class Bottlenecked(NamedTuple):
    latents: Tensor  # (B, D, h, w), what the decoder sees; gradients flow to the encoder
    codes: Tensor  # (B, Q, h, w) int64 in [0, codebook_size)
    loss: Tensor  # scalar: commitment and codebook terms, weighted


class Bottleneck(nn.Module, ABC):
    """Latents in, latents and codes out."""

    codebook_size: int
    num_codebooks: int  # Q

    @abstractmethod
    def forward(self, z: Tensor) -> Bottlenecked:
        """(B, D, h, w) float32 -> the decoder's latents, their codes, the loss. In train mode codebooks may move."""

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """(B, Q, h, w) -> (B, D, h, w): `lookup(forward(z).codes)` equals `forward(z).latents`."""
