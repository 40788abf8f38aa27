"""Vector quantization with a codebook that follows the gradient: van den Oord et al. 2017, equation 3.

Latents and codes may be compared on the unit sphere, best in few dimensions (ViT-VQGAN, Yu et al. 2021, section 3.2:
"factorized" and "l2-normalized" codes); the trunk's `code_dim` brings latents down to them and up again. Or the code
with the largest dot product is chosen, as in index backpropagation quantization (IBQ, Shi et al. 2024). IBQ also trains
all codes at once, through a softmax of these products; here only the choice is IBQ's, the losses are the usual ones.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Bottleneck, Bottlenecked
from stage1_tokenizer.bottlenecks.codebook import (
    Gradient,
    Revival,
    most_alike,
    nearest,
    pass_gradient,
    sum_over_processes,
)

Normalize = Literal["none", "lookup", "both"]
Metric = Literal["euclidean", "dot-product"]


class VectorQuantizer(Bottleneck):
    """K vectors of D channels. The commitment weight beta multiplies the commitment term (taming's default did not)."""

    codebook_size: int
    num_codebooks = 1

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        beta: float,
        patience: int,
        normalize: Normalize = "none",
        gradient: Gradient = "straight-through",
        metric: Metric = "euclidean",
    ) -> None:
        super().__init__()
        self.codebook_size, self.beta, self.normalize, self.gradient = codebook_size, beta, normalize, gradient
        self.metric = metric
        self.codebook = nn.Parameter(torch.randn(codebook_size, dim) / codebook_size)  # (K, D)
        self.revival = Revival(codebook_size, patience)

    def forward(self, z: Tensor) -> Bottlenecked:
        z = F.normalize(z, dim=1) if self.normalize == "both" else z
        vectors = rearrange(z.detach(), "b d h w -> (b h w) d")
        flat = self._choose(vectors)  # (N,)
        if self.training:
            used = sum_over_processes(flat.bincount(minlength=self.codebook_size))
            dead, replacements = self.revival(used, vectors)
            with torch.no_grad():
                self.codebook[dead] = replacements
            flat = self._choose(vectors) if len(dead) else flat
        codes = rearrange(flat, "(b h w) -> b 1 h w", h=z.shape[2], w=z.shape[3])
        quantized = self.lookup(codes)
        codebook_loss = F.mse_loss(quantized, z.detach())  # moves codes towards the encoder
        commitment_loss = F.mse_loss(z, quantized.detach())  # moves the encoder towards its codes
        latents = pass_gradient(z, quantized, self.gradient)
        return Bottlenecked(latents, codes, codebook_loss + self.beta * commitment_loss)

    def lookup(self, codes: Tensor) -> Tensor:
        rows = self.codebook[codes[:, 0]]  # (B, h, w, D)
        rows = rows if self.normalize == "none" else F.normalize(rows, dim=-1)
        return rearrange(rows, "b h w d -> b d h w")

    def _choose(self, vectors: Tensor) -> Tensor:
        """(N, D) -> the code of each vector, (N,) int64."""
        codebook = self.codebook.detach()
        codebook = F.normalize(codebook, dim=1) if self.normalize == "both" else codebook
        return nearest(vectors, codebook) if self.metric == "euclidean" else most_alike(vectors, codebook)
