"""Figures of merit that several stages use."""

import torch
from torch import Tensor


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, (B, 3, H, W) in [-1, 1] -> (B,).

    Values are rounded to 8 bits first, as the saved pictures are; equal pictures give infinity.
    """
    first, second = (((x.float().clamp(-1, 1) + 1) * 127.5).round() for x in (images, reference))
    mse = (first - second).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255.0**2 / mse)


def code_counts(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs: (B, Q, h, w) int64 -> (Q, K)."""
    return torch.stack([level.flatten().bincount(minlength=codebook_size) for level in codes.unbind(1)])


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of code use, mean over the codebooks: K when all codes are used alike, 1 when one is.

    `counts` is (Q, K) as `code_counts` gives it.
    """
    probabilities = counts.double() / counts.sum(1, keepdim=True)
    return float(torch.exp(torch.special.entr(probabilities).sum(1)).mean())
