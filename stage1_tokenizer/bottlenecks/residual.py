"""Residual vector quantization: each code of a position refines the ones before it (Lee et al. 2022, section 3.1).

Deliberate difference from RQ-VAE: every depth has its own codebook, a running mean as in `vq_ema.py`.
"""

import torch
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Bottleneck, Bottlenecked
from stage1_tokenizer.bottlenecks.codebook import Gradient, pass_gradient
from stage1_tokenizer.bottlenecks.vq_ema import EMAVectorQuantizer


class ResidualQuantizer(Bottleneck):
    """Q codebooks of K vectors; codebook q quantizes what codebooks 0..q-1 left over."""

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        dim: int,
        beta: float,
        decay: float,
        patience: int,
        gradient: Gradient = "straight-through",
    ) -> None:
        super().__init__()
        self.num_codebooks, self.codebook_size, self.gradient = num_codebooks, codebook_size, gradient
        self.levels = nn.ModuleList(
            EMAVectorQuantizer(codebook_size, dim, beta, decay, patience) for _ in range(num_codebooks)
        )

    def forward(self, z: Tensor) -> Bottlenecked:
        quantized, losses = torch.zeros_like(z), []
        codes: list[Tensor] = []
        for level in self.levels:
            # The residual keeps the gradient of z, so each depth commits z to all codes so far (equation 6).
            output: Bottlenecked = level(z - quantized)
            quantized = quantized + output.latents.detach()
            assert output.codes is not None
            codes.append(output.codes)
            losses.append(output.loss)
        latents = pass_gradient(z, quantized, self.gradient)
        return Bottlenecked(latents, torch.cat(codes, dim=1), torch.stack(losses).mean())

    def lookup(self, codes: Tensor) -> Tensor:
        found = []
        for level, part in zip(self.levels, codes.split(1, dim=1), strict=True):
            assert isinstance(level, EMAVectorQuantizer)
            found.append(level.lookup(part))
        return torch.stack(found).sum(0)
