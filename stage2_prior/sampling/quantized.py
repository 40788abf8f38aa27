"""Products with weights of 8 bits on an NVIDIA GPU, by torch's own kernels: int8, or e4m3 (Micikevicius et al. 2022).

Both sides are scaled: the weights of an output once, a row that is multiplied when it comes ("vector-wise", Dettmers
et al. 2022, section 2.1). On a CPU the same code runs for the tests; `kernels.cpp` has the int8 that is fast there.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.sampling.settings import Precision
from stage2_prior.sampling.weights import LayerWeights
from tessera.errors import InputError

FEWEST = 32  # rows that `_int_mm` multiplies on a GPU
MULTIPLE = 16  # of both sides of a weight, for the GPU's kernels

Product = Callable[[Tensor], Tensor]


def without_fp8() -> str:
    """Why this torch does not multiply in fp8, in one clause; empty when it does."""
    if hasattr(F, "scaled_mm"):
        return ""
    return f"torch {torch.__version__} does not multiply in it; take int8, or torch 2.10 or newer"


class Products(NamedTuple):
    """The products of a layer, (N, in) -> (N, out) each."""

    qkv: Product
    out: Product
    mlp_in: Product
    mlp_out: Product


def products(layer: LayerWeights, precision: Precision) -> Products:
    """With the weights as they are, or with copies in 8 bits."""
    matrices = layer.qkv, layer.out, layer.mlp_in, layer.mlp_out
    match precision:
        case "int8":
            return Products(*map(Int8, matrices))
        case "fp8":
            return Products(*map(FP8, matrices))
        case "float32" | "bfloat16":
            return Products(*(partial(F.linear, weight=matrix) for matrix in matrices))


class Int8:
    def __init__(self, weight: Tensor) -> None:
        rounded, self.scale = to_int8(weight.detach())
        self.weight = rounded.T  # (in, out), each output's weights side by side, as the kernel reads them

    def __call__(self, x: Tensor) -> Tensor:
        rows, scale = to_int8(x)
        padded = F.pad(rows, (0, 0, 0, max(0, FEWEST - len(rows))))
        sums = torch._int_mm(padded, self.weight)[: len(rows)]  # exact, in int32
        return (sums * scale * self.scale.T).to(x.dtype)


class FP8:
    def __init__(self, weight: Tensor) -> None:
        if reason := without_fp8():
            raise InputError(f"weights cannot be kept in fp8: {reason}")
        rounded, scale = to_fp8(weight.detach())
        self.weight, self.scale = rounded.T, scale.T.contiguous()  # (in, out), (1, out)

    def __call__(self, x: Tensor) -> Tensor:
        rows, scale = to_fp8(x)
        by_row = F.ScalingType.RowWise
        sums = F.scaled_mm(rows, self.weight, scale, by_row, self.scale, by_row, output_dtype=torch.bfloat16)
        return sums.to(x.dtype)


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, E) as int8 and the scale of each row (rows, 1) float32: x is about their product."""
    scale = _scale(x, 127)
    return (x / scale).round().to(torch.int8), scale


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, E) as float8_e4m3fn and the scale of each row (rows, 1) float32: x is about their product."""
    scale = _scale(x, torch.finfo(torch.float8_e4m3fn).max)
    return (x / scale).to(torch.float8_e4m3fn), scale


def _scale(x: Tensor, largest: float) -> Tensor:
    return x.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / largest
