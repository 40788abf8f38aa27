"""3x3 convolutions with a quarter of the products, on CPUs: Winograd's F(4x4, 3x3) (Lavin & Gray 2016, section 4.1).

Each 4 x 4 block of outputs is made of a 6 x 6 block of inputs: both sides are brought to 36 numbers in which the
convolution is 36 products instead of 144, channel by channel a matrix product that BLAS does at full speed. The rest is
sums (`winograd.cpp`), done for some rows of blocks at a time so that they stay in the processor's cache.

Rounding is several times that of the plain convolution (5e-5 instead of 1e-5 for outputs of size 1), which pictures do
not show and codes might: decoders use it, encoders never. Only float32 inference at many pixels gains; everything else,
training and bfloat16 among it, is the plain convolution, and so is all of it on a machine without a compiler.

Letters: B batch, C channels in, D channels out, H W pixels, n blocks a column, m blocks a row.
"""

import ctypes
import functools
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from common import native

FEWEST_PIXELS = 64 * 64  # below, bringing the weights there costs more than it saves
BLOCKS = 256  # at a time, or a row of them
WEIGHTS = (  # the paper's G: three weights to six numbers
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


class WinogradConv2d(nn.Conv2d):
    """A convolution of 3 x 3 with padding 1; the same parameters and, up to rounding, the same result."""

    def __init__(self, width_in: int, width: int, kernel_size: int = 3, padding: int = 1) -> None:
        assert (kernel_size, padding) == (3, 1)
        super().__init__(width_in, width, kernel_size, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        gains = (
            x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and height * width >= FEWEST_PIXELS
            and height % 4 == width % 4 == 0
        )
        sums = _sums() if gains else None
        if sums is None:
            return super().forward(x)
        assert self.bias is not None
        return convolve(sums, x, self.weight, self.bias)


@functools.cache
def _sums() -> ctypes.CDLL | None:
    """The compiled sums; None, and a line that says why, where there can be none."""
    try:
        library = native.library(Path(__file__).with_name("winograd.cpp"), "sums of fast convolutions")
    except native.Unavailable as error:
        print(f"pictures are decoded by plain convolutions, which are slower: {error}", file=sys.stderr)
        return None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.picture_to_numbers.argtypes = [pointer, *[count] * 5, pointer, pointer, count]
    library.numbers_to_picture.argtypes = [pointer, pointer, *[count] * 4, pointer, count]
    return library


def convolve(sums: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, C, H, W), (D, C, 3, 3), (D,) -> (B, D, H, W), all float32, H and W divisible by 4; channels last. Picture by
    picture, so that each comes out the same in any company.
    """
    (batch, channels, height, width), wide = x.shape, len(bias)
    rule = weight.new_tensor(WEIGHTS)
    kernels = torch.einsum("ij,dcjk,lk->ilcd", rule, weight, rule).flatten(0, 1).contiguous()  # (36, C, D)
    pictures, bias = x.permute(0, 2, 3, 1).contiguous(), bias.contiguous()  # (B, H, W, C)
    out = x.new_empty(batch, height, width, wide)
    down, across = height // 4, width // 4  # n, m
    rows, threads = max(1, BLOCKS // across), torch.get_num_threads()
    # All that is between is written to the same memory again and again: fresh memory costs more than the sums.
    numbers, products = x.new_empty(36 * rows * across * channels), x.new_empty(36 * rows * across * wide)
    border = x.new_zeros(channels)
    for picture, drawn in zip(pictures, out, strict=True):
        for first in range(0, down, rows):
            k = min(rows, down - first)
            n, product = (
                space[: 36 * k * across * size].view(36, k * across, size)
                for space, size in ((numbers, channels), (products, wide))
            )
            sums.picture_to_numbers(
                picture.data_ptr(), height, width, channels, first, k, border.data_ptr(), n.data_ptr(), threads
            )
            torch.bmm(n, kernels, out=product)
            sums.numbers_to_picture(
                product.data_ptr(), bias.data_ptr(), width, wide, first, k, drawn.data_ptr(), threads
            )
    return out.permute(0, 3, 1, 2)
