"""Prefixes that are padded on the left: which of their positions are there, and what the others may do to attention.

Letters: N sequences, P prefix, L positions so far.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.blocks import KeyValues


class PaddedKeyValues(KeyValues):
    """Keys and values that know which positions of the prefix are padding."""

    def __init__(self, keys: Tensor, values: Tensor, seen: Tensor, length: int = 0) -> None:
        super().__init__(keys, values, length)
        self.seen = seen  # (N, P) bool, False where there is padding

    def repeat(self, rows: Tensor) -> "PaddedKeyValues":
        return PaddedKeyValues(self.keys[:, rows], self.values[:, rows], self.seen[rows], self.length)

    def step_mask(self) -> Tensor:
        """(N, 1, 1, L + 1): what the next position, one of the image, may see."""
        return F.pad(self.seen, (0, self.length + 1 - self.seen.shape[1]), value=True)[:, None, None]


def causal_mask(seen: Tensor, length: int) -> Tensor:
    """(N, P) -> (N, 1, L, L) for `length` positions, True where one may see another.

    Padding is seen by itself alone: attention to nothing at all is not defined.
    """
    order = torch.ones(length, length, dtype=torch.bool, device=seen.device).tril()
    own = torch.eye(length, dtype=torch.bool, device=seen.device)
    visible = F.pad(seen, (0, length - seen.shape[1]), value=True)  # (N, L)
    return (order & visible[:, None] | own)[:, None]
