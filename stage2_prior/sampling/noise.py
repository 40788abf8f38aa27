"""Draws codes by the Gumbel-max trick (Gumbel 1954), with two numbers of a row's random generator for each of them.

torch's exponential noise takes 8 ms for 32 rows of 8192 codes on a core that computes the whole step before in 60. Here
the generator of a row gives two 32-bit words, and a hash of (words, code) gives every code its number; only the words
are copied to a GPU. The hash is the 32-bit finaliser `lowbias32` of Chris Wellons' search, once for each word.

Letters: N rows, K codebook size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stage2_prior.sampling import kernels
from tessera.native import build as native

MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)  # as signed 32-bit numbers


def words_of(generators: Sequence[torch.Generator]) -> Tensor:
    """The next two words of each generator, (N, 2) int32 on the CPU: the lower halves of 64-bit numbers.

    Asked for 32-bit numbers, torch 2.6 takes others from the generator than 2.14 does.
    """
    words = torch.empty(len(generators), 2, dtype=torch.int64)
    for row, generator in zip(words, generators, strict=True):
        row.random_(generator=generator)
    return words.bitwise_and_(0xFFFFFFFF).sub_(2**31).to(torch.int32)


def draw_with(logits: Tensor, words: Tensor) -> Tensor:
    """One code a row in proportion to exp(logits): (N, K) and the rows' words (N, 2) -> (N,) int64."""
    if logits.device.type == "cpu":
        try:
            return kernels.draw(logits, words)
        except native.Unavailable:
            pass
    return (logits - exponential(words.to(logits.device, non_blocking=True), logits.shape[-1]).log_()).argmax(-1)


def exponential(words: Tensor, size: int) -> Tensor:
    """Words (N, 2) -> exponentially distributed (N, size) float32."""
    mixed = _mix(words[:, :1] + torch.arange(size, dtype=torch.int32, device=words.device))
    mixed = _mix(mixed ^ words[:, 1:])
    uniform = ((mixed >> 9) & 0x7FFFFF).float().add_(0.5).mul_(2**-23)  # 23 bits and a half: neither 0 nor 1
    return uniform.log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """int32 (..) -> int32, one to one, in place: each bit depends on all."""
    for shift, multiplier in ((16, MULTIPLIERS[0]), (15, MULTIPLIERS[1])):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(multiplier)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
