"""Codes of few dimensions and unit length: ViT-VQGAN (Yu et al. 2021, section 3.2, "factorized" and "l2-normalized").

A 1x1 convolution brings the D channels down to d, where both sides lie on the unit sphere and the nearest code is the
one of the largest cosine; another brings codes back up to D. Deliberate difference: unused codes are revived.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Bottleneck, Bottlenecked
from stage1_tokenizer.bottlenecks.codebook import Gradient, Revival, nearest, pass_gradient, sum_over_processes


class NormalizedVectorQuantizer(Bottleneck):
    codebook_size: int
    num_codebooks = 1

    def __init__(
        self, codebook_size: int, dim: int, code_dim: int, beta: float, patience: int, gradient: Gradient
    ) -> None:
        super().__init__()
        self.codebook_size, self.beta, self.gradient = codebook_size, beta, gradient
        self.project = nn.Conv2d(dim, code_dim, 1)
        self.expand = nn.Conv2d(code_dim, dim, 1)
        self.codebook = nn.Parameter(F.normalize(torch.randn(codebook_size, code_dim), dim=1))  # (K, d), of any length
        self.revival = Revival(codebook_size, patience)

    def forward(self, z: Tensor) -> Bottlenecked:
        z = F.normalize(self.project(z), dim=1)  # (B, d, h, w)
        vectors = rearrange(z.detach(), "b d h w -> (b h w) d")
        flat = nearest(vectors, self._unit_codes().detach())  # (N,)
        if self.training:
            used = sum_over_processes(flat.bincount(minlength=self.codebook_size))
            dead, replacements = self.revival(used, vectors)
            with torch.no_grad():
                self.codebook[dead] = replacements
            flat = nearest(vectors, self._unit_codes().detach()) if len(dead) else flat
        codes = rearrange(flat, "(b h w) -> b 1 h w", h=z.shape[2], w=z.shape[3])
        quantized = self._rows(codes)
        codebook_loss = F.mse_loss(quantized, z.detach())
        commitment_loss = F.mse_loss(z, quantized.detach())
        latents = self.expand(pass_gradient(z, quantized, self.gradient))
        return Bottlenecked(latents, codes, codebook_loss + self.beta * commitment_loss)

    def lookup(self, codes: Tensor) -> Tensor:
        return self.expand(self._rows(codes))

    def _unit_codes(self) -> Tensor:
        return F.normalize(self.codebook, dim=1)

    def _rows(self, codes: Tensor) -> Tensor:
        """(B, 1, h, w) -> (B, d, h, w) of unit length."""
        return rearrange(self._unit_codes()[codes[:, 0]], "b h w d -> b d h w")
