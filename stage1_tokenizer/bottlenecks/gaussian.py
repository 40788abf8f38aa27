"""The variational autoencoder's diagonal Gaussian: Kingma & Welling 2014, equation 10 and appendix B.

q(z|x) = N(mean, diag(exp(log_variance))), p(z) = N(0, 1). Training draws mean + std * noise, so that the gradient
reaches both (section 2.4); evaluation takes the mean.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Bottlenecked, ContinuousBottleneck


class Posterior(NamedTuple):
    mean: Tensor  # (B, D, h, w)
    log_variance: Tensor  # (B, D, h, w), of each number


class Gaussian(ContinuousBottleneck):
    """A 1x1 convolution reads mean and log variance from the encoder's D channels."""

    def __init__(self, dim: int, kl_weight: float) -> None:
        super().__init__()
        self.kl_weight = kl_weight
        self.project = nn.Conv2d(dim, 2 * dim, 1)

    def forward(self, z: Tensor) -> Bottlenecked:
        posterior = self.posterior(z)
        latents = posterior.mean
        if self.training:
            latents = latents + torch.exp(0.5 * posterior.log_variance) * torch.randn_like(latents)
        return Bottlenecked(latents, None, self.kl_weight * kl_divergence(posterior))

    def posterior(self, z: Tensor) -> Posterior:
        mean, log_variance = self.project(z).chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(-30, 20))  # beyond, exp leaves float32's comfort


def kl_divergence(posterior: Posterior) -> Tensor:
    """KL(q || N(0, 1)) in nats: the sum over the D channels, the mean over the positions of all images."""
    mean, log_variance = posterior
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
