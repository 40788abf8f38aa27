"""Lookup-free quantization: MAGVIT-v2 (Yu et al. 2023, section 3.1, equations 3 to 5).

A 1x1 convolution brings the D channels down to log2(K) numbers; their signs are the bits of the code. The entropy loss
E[H(q(c|z))] - H(E[q(c|z)]) asks each position to be sure and all of them together to use all codes, with
q(c|z) = softmax over c of -|z - c|^2 / temperature. Over K codes this costs a (positions, K) table, so bits beyond
GROUP are taken in groups, as if independent (Zhao et al. 2024): exact up to K = 1024. The mean over
positions is that of one process.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Bottleneck, Bottlenecked
from stage1_tokenizer.bottlenecks.codebook import straight_through

GROUP = 10  # bits whose joint distribution is looked at


class LookupFreeQuantizer(Bottleneck):
    num_codebooks = 1
    radix: Tensor  # (bits, 1, 1) int64: 1, 2, 4, ...

    def __init__(self, codebook_size: int, dim: int, beta: float, entropy_weight: float, temperature: float) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.beta, self.entropy_weight, self.temperature = beta, entropy_weight, temperature
        bits = codebook_size.bit_length() - 1
        self.register_buffer("radix", 2 ** torch.arange(bits).view(-1, 1, 1), persistent=False)
        self.project = nn.Conv2d(dim, bits, 1)
        self.expand = nn.Conv2d(bits, dim, 1)

    def forward(self, z: Tensor) -> Bottlenecked:
        z = self.project(z)  # (B, bits, h, w)
        codes = ((z > 0) * self.radix).sum(1, keepdim=True)
        quantized = self._signs(codes)
        commitment_loss = F.mse_loss(z, quantized)
        entropy_loss = z.new_zeros(())
        if self.entropy_weight:
            sure, spread = entropies(rearrange(z, "b c h w -> (b h w) c"), self.temperature)
            entropy_loss = sure - spread
        loss = self.beta * commitment_loss + self.entropy_weight * entropy_loss
        return Bottlenecked(self.expand(straight_through(z, quantized)), codes, loss)

    def lookup(self, codes: Tensor) -> Tensor:
        return self.expand(self._signs(codes))

    def _signs(self, codes: Tensor) -> Tensor:
        """(B, 1, h, w) -> (B, bits, h, w) of -1 and 1."""
        return (codes // self.radix % 2 * 2 - 1).to(self.expand.weight)


def entropies(vectors: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(N, bits) -> the mean entropy of a position's code, and the entropy of the mean distribution; nats."""
    sure, spread = vectors.new_zeros(()), vectors.new_zeros(())
    for part in vectors.split(GROUP, dim=1):
        bits = part.shape[1]
        codes = torch.arange(2**bits, device=part.device).unsqueeze(1) >> torch.arange(bits, device=part.device) & 1
        corners = (2 * codes - 1).to(part)  # (2^bits, bits)
        # -|z - c|^2 = 2 z.c - |z|^2 - bits, and what does not depend on c is nothing to the softmax
        log_shares = F.log_softmax(2 * part @ corners.T / temperature, dim=1)  # (N, 2^bits)
        shares = log_shares.exp()
        sure = sure - (shares * log_shares).sum(1).mean()
        spread = spread + torch.special.entr(shares.mean(0).clamp_min(1e-12)).sum()
    return sure, spread
