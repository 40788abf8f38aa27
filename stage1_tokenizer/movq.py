"""The decoder of MoVQ (Zheng et al. 2022, section 3.2): every norm is modulated by the codes' vectors at its place.

Letters: B batch, C channels, H W pixels, h w latent grid, D latent channels. Otherwise VQGAN's decoder, see
convolutions.py; the encoder is the same. Always 32 groups, as in the published models.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stage1_tokenizer.convolutions import TrunkConfig, Upsample

GROUPS = 32


class MoVQDecoder(nn.Module):
    """(B, D, h, w) -> (B, 3, H, W), close to [-1, 1] but not clipped."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        widths, dim = config.decoder_widths, config.decoder_dim
        width = widths[-1]
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_dim, 1) if config.code_dim else nn.Identity()
        self.conv_in = nn.Conv2d(config.latent_dim, width, 3, padding=1)
        attention = [ModulatedAttention(width, dim)] if config.attention else []
        self.middle = nn.ModuleList([ModulatedBlock(width, width, dim), *attention, ModulatedBlock(width, width, dim)])
        self.levels = nn.ModuleList()
        for level, wide in reversed(list(enumerate(widths))):
            layers: list[nn.Module] = []
            for i in range(config.decoder_blocks):
                layers.append(ModulatedBlock(width if i == 0 else wide, wide, dim))
                layers += [ModulatedAttention(wide, dim)] if level in config.decoder_attention else []
            layers += [Upsample(wide)] if level > 0 else []
            self.levels.append(nn.ModuleList(layers))
            width = wide
        self.norm_out = ModulatedNorm(width, dim)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.conv_in(self.post_quant_conv(latents))
        for layers in (self.middle, *self.levels):
            for layer in layers:
                x = layer(x) if isinstance(layer, Upsample) else layer(x, latents)
        return self.conv_out(F.silu(self.norm_out(x, latents), inplace=True))


class ModulatedNorm(nn.Module):
    """Group norm, scaled and shifted by 1x1 convolutions of the latents, which are repeated to the size of `x`."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.scale = nn.Conv2d(dim, width, 1)
        self.shift = nn.Conv2d(dim, width, 1)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        latents = F.interpolate(latents, size=x.shape[2:], mode="nearest")
        return self.norm(x) * self.scale(latents) + self.shift(latents)


class ModulatedBlock(nn.Module):
    """VQGAN's residual block with modulated norms."""

    def __init__(self, width_in: int, width: int, dim: int) -> None:
        super().__init__()
        self.norm1 = ModulatedNorm(width_in, dim)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = ModulatedNorm(width, dim)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x, latents), inplace=True))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h, latents), inplace=True))


class ModulatedAttention(nn.Module):
    """One head over all positions, added to the input, after a modulated norm."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.norm = ModulatedNorm(width, dim)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x, latents))
        q, k, v = rearrange(qkv, "b (three c) h w -> three b 1 (h w) c", three=3).unbind()
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(mixed, "b 1 (h w) c -> b c h w", h=x.shape[2]))
