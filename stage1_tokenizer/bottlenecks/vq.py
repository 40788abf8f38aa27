"""Vector quantization with a codebook that follows the gradient: van den Oord et al. 2017, equation 3."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Bottleneck, Bottlenecked
from stage1_tokenizer.bottlenecks.codebook import Gradient, Revival, nearest, pass_gradient, sum_over_processes


class VectorQuantizer(Bottleneck):
    """K vectors of D channels. The commitment weight beta multiplies the commitment term (taming's default did not)."""

    codebook_size: int
    num_codebooks = 1

    def __init__(
        self, codebook_size: int, dim: int, beta: float, patience: int, gradient: Gradient = "straight-through"
    ) -> None:
        super().__init__()
        self.codebook_size, self.beta, self.gradient = codebook_size, beta, gradient
        self.codebook = nn.Parameter(torch.randn(codebook_size, dim) / codebook_size)  # (K, D)
        self.revival = Revival(codebook_size, patience)

    def forward(self, z: Tensor) -> Bottlenecked:
        vectors = rearrange(z.detach(), "b d h w -> (b h w) d")
        flat = nearest(vectors, self.codebook.detach())  # (N,)
        if self.training:
            used = sum_over_processes(flat.bincount(minlength=self.codebook_size))
            dead, replacements = self.revival(used, vectors)
            with torch.no_grad():
                self.codebook[dead] = replacements
            flat = nearest(vectors, self.codebook.detach()) if len(dead) else flat
        codes = rearrange(flat, "(b h w) -> b 1 h w", h=z.shape[2], w=z.shape[3])
        quantized = self.lookup(codes)
        codebook_loss = F.mse_loss(quantized, z.detach())  # moves codes towards the encoder
        commitment_loss = F.mse_loss(z, quantized.detach())  # moves the encoder towards its codes
        latents = pass_gradient(z, quantized, self.gradient)
        return Bottlenecked(latents, codes, codebook_loss + self.beta * commitment_loss)

    def lookup(self, codes: Tensor) -> Tensor:
        return rearrange(self.codebook[codes[:, 0]], "b h w d -> b d h w")
