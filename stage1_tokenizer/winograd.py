"""3x3 convolutions with fewer products, on CPUs: Winograd's F(4x4, 3x3) and F(2x2, 3x3) (Lavin & Gray 2016, 4.1).

Each block of 4 x 4 outputs is made of one of 6 x 6 inputs: both sides are brought to 36 numbers in which the
convolution is 36 products instead of 144, channel by channel a matrix product; for 2 x 2 outputs it is 16 instead of
36. The rest is sums.

In float32 blocks are of 4 x 4: rounding is several times that of the plain convolution (5e-5 instead of 1e-5 for
outputs of size 1), which pictures do not show and codes might, so decoders use it, encoders never. The sums
(`winograd.cpp`) are done for some rows of blocks at a time, so that they stay in the processor's cache, and BLAS
multiplies.

In bfloat16 that would be too much (3 % of the output's size, where the plain convolution has 0.24 %), and blocks are of
2 x 2 (0.4 %), on processors that multiply in bfloat16. `winograd_bfloat16.cpp` does all of it, a square of blocks at a
time: with BLAS between the sums, numbers go from core to core, and half of what is gained is lost on that.

Only inference at many pixels gains; training is the plain convolution, and so is all of it on a machine without a
compiler.

Letters: B batch, C channels in, D channels out, H W pixels, n blocks a column, m blocks a row.
"""

import ctypes
import functools
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from tessera.hardware import cpu_multiplies_bfloat16
from tessera.native import build as native

FEWEST_PIXELS = {torch.float32: 64 * 64, torch.bfloat16: 32 * 32}  # below, bringing the weights there costs too much
BLOCKS = 256  # at a time, or a row of them
APART = 32  # beyond a power of two between the numbers of a block, so that they do not share one line of the cache
WEIGHTS = (  # the paper's G: three weights to six numbers
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
POINTER, COUNT = ctypes.c_void_p, ctypes.c_int64


class WinogradConv2d(nn.Conv2d):
    """A convolution of 3 x 3 with padding 1; the same parameters and, up to rounding, the same result."""

    def __init__(self, width_in: int, width: int, kernel_size: int = 3, padding: int = 1) -> None:
        assert (kernel_size, padding) == (3, 1)
        super().__init__(width_in, width, kernel_size, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self._multiplied_in(x)
        if dtype == torch.bfloat16 and (whole := self._whole()) is not None:
            return convolve_bfloat16(whole, x.to(dtype), self)
        sums = _sums() if dtype == torch.float32 else None
        return super().forward(x) if sums is None else convolve(sums, x, self)

    def _multiplied_in(self, x: Tensor) -> torch.dtype | None:
        """What a plain convolution would multiply in, where another one might gain; else None."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        (height, width), side = x.shape[2:], 4 if dtype == torch.float32 else 2
        if dtype not in FEWEST_PIXELS or height * width < FEWEST_PIXELS[dtype] or height % side or width % side:
            return None
        return dtype

    def _whole(self) -> ctypes.CDLL | None:
        """What does all of it in bfloat16, if it can do so many channels."""
        library = _bfloat16() if cpu_multiplies_bfloat16() else None
        possible = library is not None and library.possible(self.in_channels, self.out_channels)
        return library if possible and self.weight.dtype in FEWEST_PIXELS else None


@functools.cache
def _sums() -> ctypes.CDLL | None:
    """The compiled sums; None, and a line that says why, where there can be none."""
    library = _built("winograd.cpp")
    if library is not None:
        library.picture_to_numbers.argtypes = [POINTER, *[COUNT] * 5, POINTER, POINTER, COUNT, COUNT]
        library.numbers_to_picture.argtypes = [POINTER, COUNT, POINTER, *[COUNT] * 4, POINTER, COUNT]
    return library


@functools.cache
def _bfloat16() -> ctypes.CDLL | None:
    """The compiled convolution in bfloat16; None, and a line that says why, where there can be none."""
    library = _built("winograd_bfloat16.cpp")
    if library is not None:
        library.possible.argtypes, library.possible.restype = [COUNT, COUNT], COUNT
        if library.possible(64, 64):  # else it was built without the processor's bfloat16, and has nothing more
            library.pack_float32.argtypes = library.pack_bfloat16.argtypes = [POINTER, COUNT, COUNT, POINTER, COUNT]
            library.convolve.argtypes = [POINTER, *[COUNT] * 3, POINTER, POINTER, COUNT, POINTER, COUNT]
    return library


def _built(source: str) -> ctypes.CDLL | None:
    try:
        return native.library(Path(__file__).with_name(source), "fast convolutions")
    except native.Unavailable as error:
        print(f"pictures are decoded by plain convolutions, which are slower: {error}", file=sys.stderr)
        return None


def convolve(sums: ctypes.CDLL, x: Tensor, conv: nn.Conv2d) -> Tensor:
    """(B, C, H, W) -> (B, D, H, W), float32, H and W divisible by 4; channels last. Picture by picture, so that each
    comes out the same in any company."""
    assert conv.bias is not None
    (batch, channels, height, width), wide = x.shape, conv.out_channels
    both = torch.tensor(WEIGHTS)
    kernels = torch.kron(both, both) @ conv.weight.flatten(2).flatten(0, 1).T
    kernels = kernels.view(36, wide, channels).transpose(1, 2)  # (36, C, D)
    pictures, bias = x.permute(0, 2, 3, 1).contiguous(), conv.bias.contiguous()  # (B, H, W, C)
    out = x.new_empty(batch, height, width, wide)
    down, across = height // 4, width // 4  # n, m
    rows, threads = max(1, BLOCKS // across), torch.get_num_threads()
    # All that is between is written to the same memory again and again: fresh memory costs more than the sums.
    numbers, products = (x.new_empty(36, rows * across * size + APART) for size in (channels, wide))
    border = x.new_zeros(channels)
    for picture, drawn in zip(pictures, out, strict=True):
        for first in range(0, down, rows):
            k = min(rows, down - first)
            n, product = (
                space[:, : k * across * size].unflatten(1, (k * across, size))
                for space, size in ((numbers, channels), (products, wide))
            )
            sums.picture_to_numbers(
                picture.data_ptr(), height, width, channels, first, k, border.data_ptr(), n.data_ptr(), n.stride(0),
                threads,
            )  # fmt: skip
            torch.bmm(n, kernels, out=product)
            sums.numbers_to_picture(
                product.data_ptr(), product.stride(0), bias.data_ptr(), width, wide, first, k, drawn.data_ptr(), threads
            )
    return out.permute(0, 3, 1, 2)


def convolve_bfloat16(library: ctypes.CDLL, x: Tensor, conv: nn.Conv2d) -> Tensor:
    """(B, C, H, W) -> (B, D, H, W), bfloat16, H and W even; channels last. Picture by picture, so that each comes out
    the same in any company."""
    assert conv.bias is not None
    (batch, channels, height, width), wide, threads = x.shape, conv.out_channels, torch.get_num_threads()
    weight, bias = conv.weight.permute(0, 2, 3, 1).contiguous(), conv.bias.float().contiguous()  # (D, 3, 3, C)
    pack = library.pack_bfloat16 if weight.dtype == torch.bfloat16 else library.pack_float32
    kernels = x.new_empty(16 * channels * wide)
    pack(weight.data_ptr(), channels, wide, kernels.data_ptr(), threads)
    pictures, out = x.permute(0, 2, 3, 1).contiguous(), x.new_empty(batch, height, width, wide)  # (B, H, W, C)
    for picture, drawn in zip(pictures, out, strict=True):
        library.convolve(
            picture.data_ptr(), height, width, channels, kernels.data_ptr(), bias.data_ptr(), wide, drawn.data_ptr(),
            threads,
        )  # fmt: skip
    return out.permute(0, 3, 1, 2)
