"""The convolutional trunk of VQGAN (Esser, Rombach, Ommer 2021, appendix; after Ho et al. 2020), encoder and decoder.

Letters: B batch, C channels, H W pixels, h w latent grid, D latent channels. Deliberate differences from taming:
`patch_size` > 1 folds pixels into channels before the first convolution (Shi et al. 2016), which saves the costliest
level; encoder and decoder may have different numbers of blocks and widths; attention sits in the middle, and at other
levels only where the config lists them (taming lists resolutions, which depend on the image size it was trained at).
"""

from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from tessera.config import Config
from tessera.errors import InputError


class TrunkConfig(Config):
    type: Literal["convolutional"] = "convolutional"
    # patchwise: see patches.py; none: this tokenizer only decodes
    encoder: Literal["convolutional", "patchwise", "none"] = "convolutional"
    decoder: Literal["convolutional", "modulated"] = "convolutional"  # modulated: see movq.py
    image_channels: int = Field(3, ge=1)  # RGB; or, for maps, one for each label
    channels: int = Field(128, ge=1)  # width of the first level
    multipliers: tuple[int, ...] = Field((1, 1, 2, 2, 4), min_length=1)  # of the width, a level each
    decoder_multipliers: tuple[int, ...] | None = None  # where the decoder's differ
    stem_channels: int | None = Field(None, ge=1)  # width of the encoder's first convolution, where the level's differs
    encoder_blocks: int = Field(2, ge=1)  # residual blocks a level
    decoder_blocks: int = Field(3, ge=1)
    attention: bool = True  # in the middle, on the latent grid
    encoder_attention: tuple[int, ...] = ()  # levels with attention after every block; level 0 has the most pixels
    decoder_attention: tuple[int, ...] = ()
    patch_size: int = Field(1, ge=1)  # side of the pixel blocks folded into channels
    latent_dim: int = Field(256, ge=1)  # D
    code_dim: int | None = Field(None, ge=1)  # D between 1x1 convolutions around the bottleneck; without them when null
    norm_groups: int = Field(32, ge=1)  # of the group norms; must divide every width
    norm_eps: float = Field(1e-6, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> "TrunkConfig":
        widths = sorted({*self.widths, *self.decoder_widths, *([self.stem_channels] if self.stem_channels else [])})
        if any(width % self.norm_groups for width in widths):
            raise ValueError(f"norm_groups {self.norm_groups} must divide the widths {widths}")
        if len(self.decoder_widths) != len(self.widths):
            raise ValueError(f"decoder_multipliers must name {len(self.widths)} levels, got {self.decoder_multipliers}")
        if self.decoder == "modulated" and (self.patch_size > 1 or any(width % 32 for width in self.decoder_widths)):
            raise ValueError(f"a modulated decoder needs patch_size 1 and widths divisible by 32, got {widths}")
        if self.image_channels != 3 and (self.encoder, self.decoder) != ("convolutional", "convolutional"):
            raise ValueError(f"image_channels {self.image_channels} needs a convolutional encoder and decoder")
        if any(not 0 <= level < len(self.widths) for level in (*self.encoder_attention, *self.decoder_attention)):
            raise ValueError(f"attention levels must be in [0, {len(self.widths)})")
        return self

    @property
    def factor(self) -> int:
        """Pixels a side for one position of the latent grid."""
        return self.patch_size * 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        return [self.channels * multiplier for multiplier in self.multipliers]

    @property
    def decoder_widths(self) -> list[int]:
        return [self.channels * multiplier for multiplier in self.decoder_multipliers or self.multipliers]

    @property
    def encoder_dim(self) -> int:
        """Channels that the bottleneck is given."""
        return self.code_dim or self.latent_dim

    @property
    def decoder_dim(self) -> int:
        """Channels that the decoder is given."""
        return self.code_dim or self.latent_dim


class Encoder(nn.Module):
    """(B, image_channels, H, W) -> (B, D, h, w), unbounded; RGB is in [-1, 1]."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        widths = config.widths
        width = config.stem_channels or widths[0]
        self.patch_size = config.patch_size
        self.conv_in = nn.Conv2d(config.image_channels * config.patch_size**2, width, 3, padding=1)
        self.levels = nn.ModuleList()
        for level, wide in enumerate(widths):
            blocks = residual_blocks(config.encoder_blocks, width, wide, level in config.encoder_attention, config)
            down = [Downsample(wide)] if level < len(widths) - 1 else []
            self.levels.append(nn.Sequential(*blocks, *down))
            width = wide
        self.middle = middle(width, config)
        self.norm_out = nn.GroupNorm(config.norm_groups, width, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(width, config.latent_dim, 3, padding=1)
        self.quant_conv = nn.Conv2d(config.latent_dim, config.code_dim, 1) if config.code_dim else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(images, self.patch_size))
        for level in self.levels:
            x = level(x)
        return self.quant_conv(self.conv_out(activated(self.norm_out, self.middle(x))))


class NoEncoder(nn.Module):
    """Stands where a tokenizer that was published without its encoder would have it."""

    def forward(self, images: Tensor) -> Tensor:
        raise InputError("this tokenizer has a decoder alone and cannot encode images; use one that has an encoder")


class Decoder(nn.Module):
    """(B, D, h, w) -> (B, channels, H, W), unbounded."""

    def __init__(self, config: TrunkConfig, channels: int = 3) -> None:
        super().__init__()
        widths = config.decoder_widths
        width = widths[-1]
        self.patch_size = config.patch_size
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_dim, 1) if config.code_dim else nn.Identity()
        self.conv_in = nn.Conv2d(config.latent_dim, width, 3, padding=1)
        self.middle = middle(width, config)
        self.levels = nn.ModuleList()
        for level, wide in reversed(list(enumerate(widths))):
            attention = level in config.decoder_attention
            blocks = residual_blocks(config.decoder_blocks, width, wide, attention, config)
            up = [Upsample(wide)] if level > 0 else []
            self.levels.append(nn.Sequential(*blocks, *up))
            width = wide
        self.norm_out = nn.GroupNorm(config.norm_groups, width, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(width, channels * config.patch_size**2, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.middle(self.conv_in(self.post_quant_conv(latents)))
        for level in self.levels:
            x = level(x)
        return F.pixel_shuffle(self.conv_out(activated(self.norm_out, x)), self.patch_size)


def residual_blocks(number: int, width_in: int, width: int, attention: bool, config: TrunkConfig) -> list[nn.Module]:
    """The blocks of one level, each followed by attention where the level has it."""
    layers: list[nn.Module] = []
    for i in range(number):
        layers.append(ResidualBlock(width_in if i == 0 else width, width, config))
        layers += [SelfAttention(width, config)] if attention else []
    return layers


def middle(width: int, config: TrunkConfig) -> nn.Sequential:
    """Residual block, attention, residual block at the resolution of the codes."""
    attention = [SelfAttention(width, config)] if config.attention else []
    return nn.Sequential(ResidualBlock(width, width, config), *attention, ResidualBlock(width, width, config))


class ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width: int, config: TrunkConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_groups, width_in, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(config.norm_groups, width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(activated(self.norm1, x))
        h = self.conv2(self.dropout(activated(self.norm2, h)))
        return h.add_(self.shortcut(x))  # in place: see `activated`


def activated(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm of `x`, and its SiLU written over it: one tensor more costs more time than SiLU does."""
    return F.silu(norm(x), inplace=True)


class SelfAttention(nn.Module):
    """One head over all positions, added to the input."""

    def __init__(self, width: int, config: TrunkConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, width, eps=config.norm_eps)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (three c) h w -> three b 1 (h w) c", three=3).unbind()
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(mixed, "b 1 (h w) c -> b c h w", h=height))


class Downsample(nn.Module):
    """Halves the sides; zeros are padded right and bottom only, as in taming."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the sides, nearest neighbour and a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
