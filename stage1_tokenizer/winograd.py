"""3x3 convolutions with fewer products, on CPUs: Winograd's F(4x4, 3x3) and F(2x2, 3x3) (Lavin & Gray 2016, 4.1).

Each block of 4 x 4 outputs is made of one of 6 x 6 inputs: both sides are brought to 36 numbers in which the
convolution is 36 products instead of 144, channel by channel a matrix product that BLAS does at full speed; for 2 x 2
outputs it is 16 instead of 36. The rest is sums (`winograd.cpp`), done for some rows of blocks at a time so that they
stay in the processor's cache.

In float32 blocks are of 4 x 4: rounding is several times that of the plain convolution (5e-5 instead of 1e-5 for
outputs of size 1), which pictures do not show and codes might, so decoders use it, encoders never. In bfloat16 that
would be too much (2.5 % of the output's size, where the plain convolution has 0.25 %), and blocks are of 2 x 2 (0.4 %),
on processors that multiply in bfloat16. Only inference at many pixels gains; training is the plain convolution, and so
is all of it on a machine without a compiler.

Letters: B batch, C channels in, D channels out, H W pixels, n blocks a column, m blocks a row.
"""

import ctypes
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common import native
from common.hardware import cpu_multiplies_bfloat16

APART = 32  # more than a power of two between the numbers of a block, so that they do not fall on one line of the cache


class Rule(NamedTuple):
    """Of one size of blocks."""

    side: int  # of a block of outputs
    pixels: int  # from which on a picture gains; below, bringing the weights there costs more than it saves
    blocks: int  # at a time, or a row of them
    weights: tuple[tuple[float, float, float], ...]  # the paper's G: three weights to `side` + 2 numbers


RULES = {
    torch.float32: Rule(
        side=4,
        pixels=64 * 64,
        blocks=256,
        weights=(
            (1 / 4, 0, 0),
            (-1 / 6, -1 / 6, -1 / 6),
            (-1 / 6, 1 / 6, -1 / 6),
            (1 / 24, 1 / 12, 1 / 6),
            (1 / 24, -1 / 12, 1 / 6),
            (0, 0, 1),
        ),
    ),
    torch.bfloat16: Rule(
        side=2,
        pixels=32 * 32,
        blocks=512,
        weights=((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    ),
}


class WinogradConv2d(nn.Conv2d):
    """A convolution of 3 x 3 with padding 1; the same parameters and, up to rounding, the same result."""

    def __init__(self, width_in: int, width: int, kernel_size: int = 3, padding: int = 1) -> None:
        assert (kernel_size, padding) == (3, 1)
        super().__init__(width_in, width, kernel_size, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        sums, dtype = None, self._multiplied_in(x)
        if dtype is not None and _gains(x.shape[2:], dtype):
            sums = _sums()
        if sums is None or dtype is None:
            return super().forward(x)
        assert self.bias is not None
        return convolve(sums, x.to(dtype), self.weight, self.bias)

    def _multiplied_in(self, x: Tensor) -> torch.dtype | None:
        """What a plain convolution would multiply in; None where it is to be one."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if torch.is_autocast_enabled("cpu"):
            return torch.get_autocast_dtype("cpu")
        return x.dtype if x.dtype == self.weight.dtype else None


def _gains(size: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether pictures of `size` (H, W) take less time so."""
    if dtype not in RULES or (dtype == torch.bfloat16 and not cpu_multiplies_bfloat16()):
        return False
    (height, width), rule = size, RULES[dtype]
    return height * width >= rule.pixels and height % rule.side == width % rule.side == 0


@functools.cache
def _sums() -> ctypes.CDLL | None:
    """The compiled sums; None, and a line that says why, where there can be none."""
    try:
        library = native.library(Path(__file__).with_name("winograd.cpp"), "sums of fast convolutions")
    except native.Unavailable as error:
        print(f"pictures are decoded by plain convolutions, which are slower: {error}", file=sys.stderr)
        return None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    for rule in RULES.values():
        to_numbers, to_picture = _both(library, rule.side)
        to_numbers.argtypes = [pointer, *[count] * 5, pointer, pointer, count, count]
        to_picture.argtypes = [pointer, count, pointer, *[count] * 4, pointer, count]
    return library


def _both(sums: ctypes.CDLL, side: int) -> tuple[Any, Any]:
    return getattr(sums, f"picture_to_numbers_{side}"), getattr(sums, f"numbers_to_picture_{side}")


def convolve(sums: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, C, H, W) float32 or bfloat16, (D, C, 3, 3), (D,) -> (B, D, H, W) as x, channels last; H and W divisible by
    the side of the rule's blocks. Picture by picture, so that each comes out the same in any company.
    """
    (batch, channels, height, width), wide = x.shape, len(bias)
    side, _, blocks, weights = RULES[x.dtype]
    to_numbers, to_picture = _both(sums, side)
    count = (side + 2) ** 2
    with torch.autocast("cpu", enabled=False):
        both = torch.tensor(weights)
        kernels = (torch.kron(both, both) @ weight.float().flatten(2).flatten(0, 1).T).to(x.dtype)
    kernels = kernels.view(count, wide, channels).transpose(1, 2)  # (count, C, D)
    pictures, bias = x.permute(0, 2, 3, 1).contiguous(), bias.float().contiguous()  # (B, H, W, C)
    out = x.new_empty(batch, height, width, wide)
    down, across = height // side, width // side  # n, m
    rows, threads = max(1, blocks // across), torch.get_num_threads()
    # All that is between is written to the same memory again and again: fresh memory costs more than the sums.
    numbers, products = (x.new_empty(count, rows * across * size + APART) for size in (channels, wide))
    border = x.new_zeros(channels)
    for picture, drawn in zip(pictures, out, strict=True):
        for first in range(0, down, rows):
            k = min(rows, down - first)
            n, product = (
                space[:, : k * across * size].unflatten(1, (k * across, size))
                for space, size in ((numbers, channels), (products, wide))
            )
            to_numbers(
                picture.data_ptr(), height, width, channels, first, k, border.data_ptr(), n.data_ptr(), n.stride(0),
                threads,
            )  # fmt: skip
            torch.bmm(n, kernels, out=product)
            to_picture(
                product.data_ptr(), product.stride(0), bias.data_ptr(), width, wide, first, k, drawn.data_ptr(), threads
            )
    return out.permute(0, 3, 1, 2)
