"""The contract of a prior: a distribution over an image's codes given a condition.

Letters: B batch, P prefix, T codes per image (Q·h·w, row by row, the codebooks of a position together), K codebook
size, E width. A prefix is whatever stands for the condition, one row an image: for the GPT, text ids (B, P) int64.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from einops import rearrange
from torch import Tensor, nn


def flatten_codes(codes: Tensor) -> Tensor:
    """The grid of an image as the sequence that a prior reads: (B, Q, h, w) -> (B, T)."""
    return rearrange(codes, "b q h w -> b (h w q)")


def unflatten_codes(sequence: Tensor, code_shape: tuple[int, int, int]) -> Tensor:
    """The inverse of `flatten_codes`, what an image tokenizer decodes: (B, T) -> (B, Q, h, w)."""
    codebooks, height, _ = code_shape
    return rearrange(sequence, "b (h w q) -> b q h w", q=codebooks, h=height)


class Cache(ABC):
    """What a prior remembers of the positions it has seen; one row for each sequence."""

    @abstractmethod
    def repeat(self, rows: Tensor) -> "Cache":
        """The cache whose row i is this one's row `rows[i]`, (N,) int64."""


class Prior(nn.Module, ABC):
    code_shape: tuple[int, int, int]  # Q, h, w
    length: int  # T
    codebook_size: int  # K
    prefix_length: int  # P

    @abstractmethod
    def prefix(self, text: Sequence[str]) -> Tensor:
        """The prefix of each text, (B, P). Raises InputError when a text is too long for the prior."""

    @abstractmethod
    def null_prefix(self, rows: int) -> Tensor:
        """The prefix of no condition at all, (rows, P): what guidance steers away from."""

    @abstractmethod
    def forward(self, prefix: Tensor, codes: Tensor) -> Tensor:
        """Teacher-forced: prefix (B, P), codes (B, T) -> logits (B, T, K); logits t depend on codes before t only."""

    @abstractmethod
    def prefill(self, prefix: Tensor, length: int) -> tuple[Tensor, Cache]:
        """Prefix (R, P) -> logits of the first code (R, K), and a cache with room for `length` further codes."""

    @abstractmethod
    def step(self, codes: Tensor, cache: Cache) -> Tensor:
        """The codes (N,) just drawn -> logits of the next ones (N, K); the cache grows by one position."""
