"""The contract of every reranker."""

from typing import Protocol

from torch import Tensor


class Reranker(Protocol):
    """Says how well images fit a prompt; a pipeline orders its candidates by that."""

    def score(self, prompt: str, images: Tensor, codes: Tensor) -> Tensor:
        """A prompt, N images (N, 3, H, W) float in [-1, 1] and their codes (N, Q, h, w) int64 -> scores (N,) float32.

        Higher fits better. The score of an image depends on no other image of the batch.
        """
