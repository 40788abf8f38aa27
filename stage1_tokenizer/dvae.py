"""The blocks of the discrete VAE of DALL-E (Ramesh et al. 2021, appendix A.2): no norms, no attention, max pooling.

Letters: B batch, H W pixels, h w latent grid, W width. Pixels are squeezed into [0.1, 0.9] on the way in, because the
logit-Laplace distribution (losses/pixels.py) has no mass at the ends. Deliberate differences from the
source: the encoder's last 1x1 convolution is the projection of the Gumbel bottleneck, and the decoder's first one,
which reads one-hot codes, is its codebook (columns plus bias).
"""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stage1_tokenizer.losses.pixels import EPSILON
from tessera.config import Config


class DVAETrunkConfig(Config):
    type: Literal["dvae"]
    channels: int = Field(256, ge=4)  # width of the encoder's first group
    multipliers: tuple[int, ...] = Field((1, 2, 4, 8), min_length=1)  # of the width, a group each
    blocks: int = Field(2, ge=1)  # a group
    decoder_channels: int = Field(128, ge=1)  # that the decoder starts from
    latent_dim: int | None = Field(None, ge=1)  # 1x1 convolutions to and from it, which all bottlenecks but gumbel need

    @property
    def image_channels(self) -> int:
        return 3

    @property
    def factor(self) -> int:
        """Pixels a side for one position of the latent grid."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        return [self.channels * multiplier for multiplier in self.multipliers]

    @property
    def gain(self) -> float:
        """Of every residual branch: one over the squared number of blocks."""
        return 1 / (len(self.multipliers) * self.blocks) ** 2

    @property
    def encoder_dim(self) -> int:
        """Channels that the bottleneck is given."""
        return self.latent_dim or self.widths[-1]

    @property
    def decoder_dim(self) -> int:
        """Channels that the decoder is given."""
        return self.latent_dim or self.decoder_channels


class DVAEEncoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> (B, W, h, w), not negative; through `latent_dim`, where there is one, (B, D, h, w)."""

    def __init__(self, config: DVAETrunkConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(3, widths[0], 7, padding=3)
        self.groups = nn.ModuleList()
        for width_in, width in zip([widths[0], *widths], widths, strict=False):
            blocks = [
                DVAEBlock(width_in if i == 0 else width, width, (3, 3, 3, 1), config.gain) for i in range(config.blocks)
            ]
            self.groups.append(nn.Sequential(*blocks))
        self.conv_out = nn.Conv2d(widths[-1], config.latent_dim, 1) if config.latent_dim else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(self.squeeze(images))
        for i, group in enumerate(self.groups):
            x = group(F.max_pool2d(x, 2) if i > 0 else x)
        return self.conv_out(x.relu())

    def squeeze(self, images: Tensor) -> Tensor:
        """[-1, 1] -> [0.1, 0.9]"""
        return (images + 1) / 2 * (1 - 2 * EPSILON) + EPSILON


class DVAEDecoder(nn.Module):
    """(B, decoder_channels or D, h, w) -> (B, channels, H, W), unbounded."""

    def __init__(self, config: DVAETrunkConfig, channels: int = 6) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.conv_in = nn.Conv2d(config.latent_dim, config.decoder_channels, 1) if config.latent_dim else nn.Identity()
        self.groups = nn.ModuleList()
        for width_in, width in zip([config.decoder_channels, *widths], widths, strict=False):
            blocks = [
                DVAEBlock(width_in if i == 0 else width, width, (1, 3, 3, 3), config.gain) for i in range(config.blocks)
            ]
            self.groups.append(nn.Sequential(*blocks))
        self.conv_out = nn.Conv2d(widths[-1], channels, 1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.conv_in(latents)
        for i, group in enumerate(self.groups):
            x = group(F.interpolate(x, scale_factor=2.0, mode="nearest") if i > 0 else x)
        return self.conv_out(x.relu())


class DVAEBlock(nn.Module):
    """Four convolutions, each after a ReLU, a quarter as wide inside; their sum is weighted by `gain`."""

    def __init__(self, width_in: int, width: int, kernels: tuple[int, int, int, int], gain: float) -> None:
        super().__init__()
        self.gain = gain
        inner = width // 4
        widths = [width_in, inner, inner, inner, width]
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], kernel, padding=kernel // 2) for i, kernel in enumerate(kernels)
        )
        self.shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for conv in self.convs:
            h = conv(h.relu())
        return self.shortcut(x) + self.gain * h
