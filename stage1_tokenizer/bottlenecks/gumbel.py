"""Codes chosen by logits: the Gumbel-softmax relaxation (Jang et al. 2017), as in the dVAE (Ramesh et al. 2021).

Deliberate difference from taming and ruDALL-E: no noise outside training, so an image always gives the same codes.
"""

import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Bottleneck, Bottlenecked
from stage1_tokenizer.bottlenecks.codebook import straight_through


class GumbelQuantizer(Bottleneck):
    """A 1x1 projection gives K logits; the code is the largest, its vector a row of the codebook."""

    num_codebooks = 1

    def __init__(self, codebook_size: int, dim: int, code_dim: int, temperature: float, kl_weight: float) -> None:
        super().__init__()
        self.codebook_size, self.temperature, self.kl_weight = codebook_size, temperature, kl_weight
        self.projection = nn.Conv2d(dim, codebook_size, 1)
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))  # (K, code_dim)

    def forward(self, z: Tensor) -> Bottlenecked:
        logits = self.projection(z)  # (B, K, h, w)
        noise = -torch.empty_like(logits).exponential_().log() if self.training else torch.zeros_like(logits)
        choice = ((logits + noise) / self.temperature).softmax(1)
        codes = choice.argmax(1, keepdim=True)
        soft = einsum(choice, self.codebook, "b k h w, k d -> b d h w")
        log_chances = logits.log_softmax(1)
        divergence = (log_chances.exp() * (log_chances + math.log(self.codebook_size))).sum(1).mean()
        return Bottlenecked(straight_through(soft, self.lookup(codes)), codes, self.kl_weight * divergence)

    def lookup(self, codes: Tensor) -> Tensor:
        return rearrange(F.embedding(codes[:, 0], self.codebook), "b h w d -> b d h w")
