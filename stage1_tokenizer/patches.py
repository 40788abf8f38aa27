"""An encoder that sees each patch alone: a thing gets the same codes wherever it stands and whatever is beside it.

A convolutional encoder reads a patch together with its surroundings, and through its norms and attention with the whole
image, so that a glyph's codes change with its neighbours and background. Codes of single patches do not: what a prior
learned of a thing in one image holds in all others. The decoder still sees the whole image. The price is the
redundancy between neighbouring patches, which residual codes pay for.

Letters: B batch, H W pixels, h w patches, D latent channels.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stage1_tokenizer.convolutions import TrunkConfig


class PatchEncoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> (B, D, h, w), unbounded: one network for every patch of `factor` x `factor` pixels."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        width = config.widths[-1]
        self.factor = config.factor
        self.embed = nn.Linear(3 * config.factor**2, width)
        self.blocks = nn.ModuleList(PatchBlock(width) for _ in range(config.encoder_blocks))
        self.norm_out = nn.RMSNorm(width, eps=1e-6)
        self.out = nn.Linear(width, config.latent_dim)

    def forward(self, images: Tensor) -> Tensor:
        x = rearrange(images, "b c (h p) (w r) -> b h w (c p r)", p=self.factor, r=self.factor)
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return rearrange(self.out(self.norm_out(x)), "b h w d -> b d h w")


class PatchBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.widen = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.gelu(self.widen(self.norm(x))))
