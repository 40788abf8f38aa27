"""The discrete VAE: a categorical code relaxed by Gumbel-softmax (Jang et al. 2017; Ramesh et al. 2021, section 2.1).

A 1x1 convolution gives each position K logits. Training mixes the rows of an embedding by a softmax of logits plus
Gumbel noise at a temperature that falls; inference takes the row of the largest logit. The loss is the KL between the
code's distribution and the uniform prior. Temperature and KL weight follow the number of training steps, which is part
of the weights, so that a resumed run continues where it was. The rows may have another width than z (`code_dim`).
Deliberate difference from taming and ruDALL-E: no noise outside training, so an image always has the same codes.
"""

import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Bottleneck, Bottlenecked
from stage1_tokenizer.bottlenecks.codebook import straight_through


class GumbelQuantizer(Bottleneck):
    codebook_size: int
    num_codebooks = 1
    steps: Tensor  # scalar int64: training steps so far

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        code_dim: int,
        *,
        temperature: float,
        final_temperature: float,
        temperature_steps: int,
        kl_weight: float,
        kl_steps: int,
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.start, self.final, self.temperature_steps = temperature, final_temperature, temperature_steps
        self.full_kl_weight, self.kl_steps = kl_weight, kl_steps
        self.projection = nn.Conv2d(dim, codebook_size, 1)
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))  # (K, code_dim)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def temperature(self) -> Tensor:
        return cosine(self.start, self.final, self.steps, self.temperature_steps)

    @property
    def kl_weight(self) -> Tensor:
        return cosine(0.0, self.full_kl_weight, self.steps, self.kl_steps)

    def forward(self, z: Tensor) -> Bottlenecked:
        logits = self.projection(z)  # (B, K, h, w)
        codes = logits.argmax(1, keepdim=True)  # (B, 1, h, w)
        if self.training:
            latents = self._mix(F.gumbel_softmax(logits, tau=self.temperature, dim=1))  # type: ignore[arg-type]
        else:
            latents = self.lookup(codes)
            if torch.is_grad_enabled():  # the gradient of the mixture without noise
                latents = straight_through(self._mix(F.softmax(logits / self.temperature, dim=1)), latents)
        loss = self.kl_weight * kl_to_uniform(logits)
        if self.training:
            self.steps += 1
        return Bottlenecked(latents, codes, loss)

    def lookup(self, codes: Tensor) -> Tensor:
        return rearrange(self.codebook[codes[:, 0]], "b h w d -> b d h w")

    def _mix(self, shares: Tensor) -> Tensor:
        """Shares of the K rows, (B, K, h, w) -> (B, D, h, w)."""
        return einsum(shares, self.codebook, "b k h w, k d -> b d h w")


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(softmax(logits) || uniform) in nats, from 0 to log K: (B, K, h, w) -> scalar, the mean over positions."""
    log_shares = F.log_softmax(logits, dim=1)
    return (log_shares.exp() * log_shares).sum(1).mean() + math.log(logits.shape[1])


def cosine(start: float, end: float, step: Tensor, steps: int) -> Tensor:
    """From `start` to `end` along half a cosine, at `step` of `steps`; `end` afterwards."""
    progress = (step / max(1, steps)).clamp(max=1.0) if steps else torch.ones_like(step, dtype=torch.float32)
    return end + (start - end) * 0.5 * (1 + torch.cos(math.pi * progress))
