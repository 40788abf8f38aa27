"""3x3 convolutions with fewer products, for inference on a CPU: Winograd's F(4x4, 3x3) and F(2x2, 3x3) (Lavin & Gray
2016, section 4.1).

Each block of 4 x 4 outputs is computed from one of 6 x 6 inputs: inputs and weights are transformed to 36 numbers in
which the convolution is 36 products instead of 144, channel by channel a matrix product; for 2 x 2 outputs it is 16
instead of 36. The rest is sums.

In float32 blocks are of 4 x 4: the rounding error is several times that of the plain convolution (5e-5 instead of 1e-5
for outputs of size 1), which images do not show and codes might. The sums (`winograd.cpp`) are done for some rows of
blocks at a time, so that they stay in the processor's cache; BLAS or oneDNN multiplies.

In bfloat16 that would be too much (3 % of the output's size, where the plain convolution has 0.24 %), and blocks are of
2 x 2 (0.4 %), on processors that multiply in bfloat16. `winograd_bfloat16.cpp` does all of it, a square of blocks at a
time: with BLAS between the sums, numbers move from core to core, which costs half of the gain.

Only inference on many pixels gains; training, small inputs and machines without a compiler get the plain convolution.

Letters: B batch, C channels in, D channels out, H W pixels, n blocks a column, m blocks a row.
"""

import ctypes
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tessera.hardware import cpu_multiplies_bfloat16
from tessera.native import build
from tessera.native.linear import multiplies_by_onednn, product

logger = logging.getLogger("tessera")

MIN_PIXELS = {torch.float32: 64 * 64, torch.bfloat16: 32 * 32}  # below, transforming the weights costs too much
MIN_CHANNELS = 64  # below, the sums cost what the products save
BLOCKS = 256  # at a time, or a row of them
GAP = 32  # beyond a power of two between the numbers of a block, so that they do not share one line of the cache
G = (  # the paper's: three weights to six numbers
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
POINTER, COUNT = ctypes.c_void_p, ctypes.c_int64


def suits(conv: nn.Conv2d) -> bool:
    """Whether `WinogradConv2d` computes what `conv` does and may be faster."""
    same = (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
    zeros = conv.padding_mode == "zeros" and conv.groups == 1 and conv.bias is not None
    return same and zeros and min(conv.in_channels, conv.out_channels) >= MIN_CHANNELS


class WinogradConv2d(nn.Conv2d):
    """A convolution that `suits`; the same parameters and, up to rounding, the same result."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = self._gains_in(x)
        if dtype == torch.bfloat16 and (library := self._bfloat16_library()) is not None:
            return convolve_bfloat16(library, x.to(dtype), self)
        library = _float32_library() if dtype == torch.float32 else None
        return super().forward(x) if library is None else convolve(library, x, self)

    def _gains_in(self, x: Tensor) -> torch.dtype | None:
        """The precision that a plain convolution would multiply in, where another one may be faster; else None."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        (height, width), side = x.shape[2:], 4 if dtype == torch.float32 else 2
        if dtype not in MIN_PIXELS or height * width < MIN_PIXELS[dtype] or height % side or width % side:
            return None
        return dtype

    def _bfloat16_library(self) -> ctypes.CDLL | None:
        """The compiled convolution in bfloat16, if it supports this number of channels."""
        library = _bfloat16_library() if cpu_multiplies_bfloat16() else None
        possible = library is not None and library.possible(self.in_channels, self.out_channels)
        return library if possible and self.weight.dtype in MIN_PIXELS else None


@functools.cache
def _float32_library() -> ctypes.CDLL | None:
    """The compiled sums; None, and a line that says why, where they cannot be built."""
    library = _built("winograd.cpp")
    if library is not None:
        library.to_numbers.argtypes = [POINTER, *[COUNT] * 5, POINTER, POINTER, COUNT, COUNT]
        library.from_products.argtypes = [POINTER * 36, POINTER, *[COUNT] * 4, POINTER, COUNT]
    return library


@functools.cache
def _bfloat16_library() -> ctypes.CDLL | None:
    """The compiled convolution in bfloat16; None, and a line that says why, where it cannot be built."""
    library = _built("winograd_bfloat16.cpp")
    if library is not None:
        library.possible.argtypes, library.possible.restype = [COUNT, COUNT], COUNT
        if library.possible(64, 64):  # else it was built without the processor's bfloat16, and has nothing more
            library.pack_float32.argtypes = library.pack_bfloat16.argtypes = [POINTER, COUNT, COUNT, POINTER, COUNT]
            library.convolve.argtypes = [POINTER, *[COUNT] * 3, POINTER, POINTER, COUNT, POINTER, COUNT]
    return library


def _built(source: str) -> ctypes.CDLL | None:
    try:
        return build.library(Path(__file__).with_name(source), "fast convolutions")
    except build.Unavailable as error:
        logger.warning("images are decoded by plain convolutions, which are slower: %s", error)
        return None


def convolve(library: ctypes.CDLL, x: Tensor, conv: nn.Conv2d) -> Tensor:
    """(B, C, H, W) -> (B, D, H, W), float32, H and W divisible by 4; channels last. Image by image, so that each is the
    same in a batch of any size."""
    assert conv.bias is not None
    (batch, channels, height, width), width_out = x.shape, conv.out_channels
    both = torch.tensor(G)
    kernels = torch.kron(both, both) @ conv.weight.flatten(2).flatten(0, 1).T
    kernels = kernels.view(36, width_out, channels)
    images, bias = x.permute(0, 2, 3, 1).contiguous(), conv.bias.contiguous()  # (B, H, W, C)
    out = x.new_empty(batch, height, width, width_out)
    down, across = height // 4, width // 4  # n, m
    rows, threads = max(1, BLOCKS // across), torch.get_num_threads()
    space = x.new_empty(36, rows * across * channels + GAP)  # used again: fresh memory costs more than the sums
    border = x.new_zeros(channels)
    for image, result in zip(images, out, strict=True):
        for first in range(0, down, rows):
            k = min(rows, down - first)
            numbers = space[:, : k * across * channels].unflatten(1, (-1, channels))
            library.to_numbers(
                image.data_ptr(), height, width, channels, first, k, border.data_ptr(), numbers.data_ptr(),
                numbers.stride(0), threads,
            )  # fmt: skip
            products = multiply(numbers, kernels)
            library.from_products(
                (POINTER * 36)(*(product.data_ptr() for product in products)), bias.data_ptr(), width, width_out, first,
                k, result.data_ptr(), threads,
            )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def multiply(numbers: Tensor, kernels: Tensor) -> Sequence[Tensor]:
    """(36, k·m, C) and (36, D, C) -> 36 of (k·m, D)."""
    if multiplies_by_onednn():
        return [product(left, right) for left, right in zip(numbers, kernels, strict=True)]
    return torch.bmm(numbers, kernels.transpose(1, 2)).unbind()


def convolve_bfloat16(library: ctypes.CDLL, x: Tensor, conv: nn.Conv2d) -> Tensor:
    """(B, C, H, W) -> (B, D, H, W), bfloat16, H and W even; channels last. Image by image, so that each is the same in
    a batch of any size."""
    assert conv.bias is not None
    (batch, channels, height, width), width_out, threads = x.shape, conv.out_channels, torch.get_num_threads()
    weight, bias = conv.weight.permute(0, 2, 3, 1).contiguous(), conv.bias.float().contiguous()  # (D, 3, 3, C)
    pack = library.pack_bfloat16 if weight.dtype == torch.bfloat16 else library.pack_float32
    kernels = x.new_empty(16 * channels * width_out)
    pack(weight.data_ptr(), channels, width_out, kernels.data_ptr(), threads)
    images, out = x.permute(0, 2, 3, 1).contiguous(), x.new_empty(batch, height, width, width_out)  # (B, H, W, C)
    for image, result in zip(images, out, strict=True):
        library.convolve(
            image.data_ptr(), height, width, channels, kernels.data_ptr(), bias.data_ptr(), width_out,
            result.data_ptr(), threads,
        )  # fmt: skip
    return out.permute(0, 3, 1, 2)
