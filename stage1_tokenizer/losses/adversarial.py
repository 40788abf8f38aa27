"""The discriminator and its losses: PatchGAN (Isola et al. 2017, section 3.2), hinge losses (Lim & Ye 2017).

The weight of the adversarial term is the ratio of gradient norms at the decoder's last layer (Esser et al. 2021,
equation 7). Deliberate difference from taming: group norm instead of batch norm, so that real and reconstructed batches
cannot be told apart by their statistics and pictures of a batch do not mix.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> (B, 1, h, w), above 0 where a patch looks real."""

    def __init__(self, channels: int = 64, depth: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for level in range(1, depth + 1):
            wide = channels * min(2**level, 8)
            stride = 2 if level < depth else 1
            layers += [
                nn.Conv2d(width, wide, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(8, wide),
                nn.LeakyReLU(0.2),
            ]
            width = wide
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.contiguous(memory_format=torch.channels_last))


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Logits of real pictures and of reconstructions -> scalar, 0 once real > 1 and fake < -1."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """Logits of reconstructions -> scalar that falls as they look more real."""
    return -fake.float().mean()


def gradient_ratio(reconstruction: Tensor, fooling: Tensor, at: Tensor, limit: float = 1e4) -> Tensor:
    """|d reconstruction / d at| / |d fooling / d at|, detached and at most `limit`: puts both terms on one scale."""
    (first,) = torch.autograd.grad(reconstruction, at, retain_graph=True)
    (second,) = torch.autograd.grad(fooling, at, retain_graph=True)
    return (first.float().norm() / (second.float().norm() + 1e-6)).clamp(max=limit).detach()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, gradients flow through `module` but not into its parameters."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
