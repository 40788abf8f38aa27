"""Two levels of codes: VQ-VAE-2 (Razavi et al. 2019, section 3.1, algorithm 1).

The top level quantizes the latents at half their resolution; the bottom level quantizes what the top leaves over. So
the top alone is an image, and the bottom adds what it lacks: `lookup_top` is the image without its detail.

    z (B, D, h, w) -- down --> (B, D, h/2, w/2) -- nearest --> top codes -- up --> coarse (B, D, h, w)
    z - coarse                                  -- nearest --> bottom codes -----> detail (B, D, h, w)
    latents = coarse + detail

**Codes.** The two grids come as one (B, 5, h/2, w/2): at each position its top code, then the 2 x 2 bottom codes of the
same place, row by row. `stride` is 2: an image's code grid is half as fine as its latents', and its sides must be
divisible by twice the trunk's factor. Both codebooks have K codes. Flattened position by position, as stage 2 does with
the codes of any tokenizer, this is one sequence of 5/4·h·w codes in which a place's coarse code precedes its details.

Deliberate differences from the paper: the levels add up instead of being concatenated (the decoder's first convolution
is linear in both either way); the top is a small VQ-VAE of its own, which learns to predict z (its loss moves `down`,
`up` and its codebook, never the encoder), so that the bottom is detail by construction and not by luck; a prior sees
the top codes of a place just before its bottom codes rather than all top codes first.

Letters: B batch, D latent channels, h w latent grid, K codebook size.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Bottleneck, Bottlenecked
from stage1_tokenizer.bottlenecks.codebook import straight_through
from stage1_tokenizer.bottlenecks.vq_ema import EMAVectorQuantizer


class HierarchicalQuantizer(Bottleneck):
    num_codebooks = 5
    stride = 2
    codebook_of = (0, 1, 1, 1, 1)  # the top's; the bottom's four times

    def __init__(self, codebook_size: int, dim: int, beta: float, decay: float, patience: int) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.down = nn.Conv2d(dim, dim, 2, stride=2)  # starts as the mean of 2 x 2 positions
        self.up = nn.ConvTranspose2d(dim, dim, 2, stride=2)  # starts as their repetition
        self.top = EMAVectorQuantizer(codebook_size, dim, beta, decay, patience)
        self.bottom = EMAVectorQuantizer(codebook_size, dim, beta, decay, patience)
        with torch.no_grad():
            block = repeat(torch.eye(dim), "o i -> o i 2 2")
            self.down.weight.copy_(block / 4)
            self.up.weight.copy_(block)
            for layer in (self.down, self.up):
                assert layer.bias is not None
                layer.bias.zero_()

    def forward(self, z: Tensor) -> Bottlenecked:
        top: Bottlenecked = self.top(self.down(z.detach()))
        coarse = self.up(top.latents)
        bottom: Bottlenecked = self.bottom(z - coarse.detach())  # commits z to the sum of both levels
        prediction_loss = F.mse_loss(coarse, z.detach())
        latents = straight_through(z, coarse + bottom.latents)
        assert top.codes is not None and bottom.codes is not None
        details = rearrange(bottom.codes, "b 1 (h y) (w x) -> b (y x) h w", y=2, x=2)
        codes = torch.cat([top.codes, details], dim=1)
        return Bottlenecked(latents, codes, prediction_loss + top.loss + bottom.loss)

    def lookup(self, codes: Tensor) -> Tensor:
        details = rearrange(codes[:, 1:], "b (y x) h w -> b 1 (h y) (w x)", y=2, x=2)
        return self.lookup_top(codes) + self.bottom.lookup(details)

    def lookup_top(self, codes: Tensor) -> Tensor:
        """Codes (B, 5, h/2, w/2) -> (B, D, h, w): `lookup` with the bottom level's vectors set to zero."""
        return self.up(self.top.lookup(codes[:, :1]))
