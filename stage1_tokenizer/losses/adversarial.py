"""The discriminator and its losses: PatchGAN (Isola et al. 2017, section 3.2), hinge losses (Lim & Ye 2017) or
non-saturating ones (Goodfellow et al. 2014, section 3), held back by R1 or LeCam.

The weight of the adversarial term is the ratio of gradient norms at the decoder's last layer (Esser et al. 2021,
equation 7). Deliberate difference from taming: group norm instead of batch norm, so that real and reconstructed batches
cannot be told apart by their statistics and images of a batch do not mix.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, assert_never

import torch
import torch.distributed as dist
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


AdversarialKind = Literal["hinge", "non-saturating"]


class AdversarialLosses(NamedTuple):
    discriminator: Callable[[Tensor, Tensor], Tensor]  # logits of real images and of reconstructions -> scalar
    generator: Callable[[Tensor], Tensor]  # logits of reconstructions -> scalar


def adversarial_losses(kind: AdversarialKind) -> AdversarialLosses:
    match kind:
        case "hinge":
            return AdversarialLosses(hinge_discriminator, hinge_generator)
        case "non-saturating":
            return AdversarialLosses(non_saturating_discriminator, non_saturating_generator)
        case _:
            assert_never(kind)


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Logits of real images and of reconstructions -> scalar, 0 once real > 1 and fake < -1."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """Logits of reconstructions -> scalar that falls as they look more real."""
    return -fake.float().mean()


def non_saturating_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Logits -> scalar: half the cross-entropies of "real" and "fake"; log 2 where it cannot tell them apart."""
    return 0.5 * (F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean())


def non_saturating_generator(fake: Tensor) -> Tensor:
    """Logits of reconstructions -> scalar: -log of how real they look, whose gradient does not vanish far from 0."""
    return F.softplus(-fake.float()).mean()


def gradient_penalty(real: Tensor, images: Tensor) -> Tensor:
    """R1: logits (B, 1, h, w) of real `images` that require a gradient -> mean over images of |d D / d image|^2.

    Mescheder et al. 2018, equation 9 (without its gamma / 2); D of an image is the mean over its patches.
    """
    scores = real.float().mean(dim=(1, 2, 3)).sum()
    (gradient,) = torch.autograd.grad(scores, images, create_graph=True)
    return gradient.float().square().sum(dim=(1, 2, 3)).mean()


class LeCam(nn.Module):
    """Keeps logits of real images near the running mean of fake ones and the reverse: Tseng et al. 2021, equation 4.

    The running means are the same on all processes and part of a checkpoint.
    """

    means: Tensor  # (2,), of real and of fake logits
    started: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("means", torch.zeros(2))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        real, fake = real.float(), fake.float()
        self._follow(torch.stack([real.detach().mean(), fake.detach().mean()]))
        real_mean, fake_mean = self.means.clone().unbind()
        return (real - fake_mean).square().mean() + (fake - real_mean).square().mean()

    def _follow(self, means: Tensor) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(means)
            means = means / dist.get_world_size()
        self.means.lerp_(means, torch.where(self.started, 1 - self.decay, 1.0))  # the first step starts from its own
        self.started.fill_(True)


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
