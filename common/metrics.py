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


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the distribution that `counts` (K,) stand for: K when all are used alike, 1 when one is."""
    probabilities = counts.double() / counts.sum()
    return float(torch.exp(torch.special.entr(probabilities).sum()))
