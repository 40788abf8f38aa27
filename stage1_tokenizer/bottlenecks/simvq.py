"""Vector quantization with a codebook that moves as one: SimVQ (Zhu et al. 2024).

The codes are C W: K frozen random vectors C, and a linear map W that learns. A gradient to one code turns W and with it
all the others, so none is left behind. Deliberate differences from the authors' code: W has no bias, as in the paper,
and beta multiplies the commitment term.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Bottleneck, Bottlenecked
from stage1_tokenizer.bottlenecks.codebook import Gradient, nearest, pass_gradient


class SimVectorQuantizer(Bottleneck):
    codebook_size: int
    num_codebooks = 1
    codebook: Tensor  # (K, D), never moves

    def __init__(self, codebook_size: int, dim: int, beta: float, gradient: Gradient) -> None:
        super().__init__()
        self.codebook_size, self.beta, self.gradient = codebook_size, beta, gradient
        self.register_buffer("codebook", torch.randn(codebook_size, dim) / dim**0.5)
        self.projection = nn.Linear(dim, dim, bias=False)

    def forward(self, z: Tensor) -> Bottlenecked:
        vectors = rearrange(z.detach(), "b d h w -> (b h w) d")
        table = self.projection(self.codebook)  # (K, D)
        flat = nearest(vectors, table.detach())  # (N,)
        codes = rearrange(flat, "(b h w) -> b 1 h w", h=z.shape[2], w=z.shape[3])
        quantized = rearrange(table[codes[:, 0]], "b h w d -> b d h w")
        codebook_loss = F.mse_loss(quantized, z.detach())  # moves W, and with it all codes
        commitment_loss = F.mse_loss(z, quantized.detach())  # moves the encoder towards its codes
        latents = pass_gradient(z, quantized, self.gradient)
        return Bottlenecked(latents, codes, codebook_loss + self.beta * commitment_loss)

    def lookup(self, codes: Tensor) -> Tensor:
        return rearrange(self.projection(self.codebook)[codes[:, 0]], "b h w d -> b d h w")
