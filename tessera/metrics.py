"""Figures of merit that several stages use."""

import torch
from torch import Tensor


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, (B, 3, H, W) in [-1, 1] -> (B,).

    Values are rounded to 8 bits first, as the saved images are; equal images give infinity.
    """
    first, second = (((x.float().clamp(-1, 1) + 1) * 127.5).round() for x in (images, reference))
    mse = (first - second).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255.0**2 / mse)


def code_counts(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs: (B, Q, h, w) int64 -> (Q, K)."""
    return torch.stack([level.flatten().bincount(minlength=codebook_size) for level in codes.unbind(1)])


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of code use, mean over the codebooks: K when all codes are used alike, 1 when one is.

    `counts` is (codebooks, K).
    """
    probabilities = counts.double() / counts.sum(1, keepdim=True)
    return float(torch.exp(torch.special.entr(probabilities).sum(1)).mean())


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004, Gaussian window of 11, sigma 1.5): (B,), 1 when equal.

    (B, 3, H, W) in [-1, 1], rounded to 8 bits first; needs torchmetrics.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    first, second = (((x.float().clamp(-1, 1) + 1) * 127.5).round() / 255 for x in (images, reference))
    value = structural_similarity_index_measure(first, second, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)  # a pair when the full map is asked for too
    return value.reshape(len(images))


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Distance between the Gaussians of two sets of features (N, C), (M, C) (Heusel et al. 2017, equation 6).

    |m - m'|^2 + tr(S + S' - 2 (S S')^1/2), in double precision; S S' has the eigenvalues of a positive matrix, so the
    trace of its root is the sum of their roots. With features of Inception this is FID.
    """
    first, second = features.double(), reference.double()
    product = torch.atleast_2d(first.T.cov()) @ torch.atleast_2d(second.T.cov())  # (C, C)
    roots = torch.linalg.eigvals(product).real.clamp_min(0).sqrt()
    difference = first.mean(0) - second.mean(0)
    return float(difference.square().sum() + first.var(0).sum() + second.var(0).sum() - 2 * roots.sum())
