"""Finite scalar quantization: Mentzer et al. 2023, section 3.1. No codebook to learn, and none to collapse.

A 1x1 convolution brings the D channels down to one number for each entry of `levels`; number i is bounded and rounded
to one of L_i values, and the code counts them in mixed radix, the first digit fastest. Deliberate difference from the
authors' listing: the shift that keeps 0 at 0 for even levels is the inverse of the tanh it is put into, not tan.
"""

import math

import torch
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Bottleneck, Bottlenecked
from stage1_tokenizer.bottlenecks.codebook import straight_through

EPSILON = 1e-3  # keeps what is bounded short of the next value


class FiniteScalarQuantizer(Bottleneck):
    num_codebooks = 1
    levels: Tensor  # (d, 1, 1) int64
    radix: Tensor  # (d, 1, 1) int64: the product of the levels before

    def __init__(self, levels: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.codebook_size = math.prod(levels)
        radix = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels).view(-1, 1, 1), persistent=False)
        self.register_buffer("radix", torch.tensor(radix).view(-1, 1, 1), persistent=False)
        self.project = nn.Conv2d(dim, len(levels), 1)
        self.expand = nn.Conv2d(len(levels), dim, 1)

    def forward(self, z: Tensor) -> Bottlenecked:
        bounded = self.bound(self.project(z))  # (B, d, h, w)
        digits = bounded.round()
        codes = ((digits.long() + self.levels // 2) * self.radix).sum(1, keepdim=True)
        latents = self.expand(straight_through(bounded, digits) / (self.levels // 2))
        return Bottlenecked(latents, codes, z.new_zeros(()))

    def bound(self, numbers: Tensor) -> Tensor:
        """Any (B, d, h, w) -> between -L/2 and L/2 - 1, or -(L - 1)/2 and (L - 1)/2 for odd L; 0 stays 0."""
        half = (self.levels - 1) * (1 - EPSILON) / 2
        offset = 0.5 * (self.levels % 2 == 0)
        return torch.tanh(numbers + torch.atanh(offset / half)) * half - offset

    def lookup(self, codes: Tensor) -> Tensor:
        return self.expand(self.digits(codes).to(self.expand.weight) / (self.levels // 2))

    def digits(self, codes: Tensor) -> Tensor:
        """(B, 1, h, w) -> (B, d, h, w) int64, each around 0."""
        return codes // self.radix % self.levels - self.levels // 2
