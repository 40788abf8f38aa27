"""Calls `kernels.cpp`: steps of the GPT prior on a CPU, compiled for it by `tessera.native.build`."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stage2_prior.sampling.settings import Precision
from tessera.native import build as native

SOURCE = Path(__file__).with_name("kernels.cpp")
KINDS: dict[Precision, int] = {"float32": 0, "bfloat16": 1, "int8": 2}
STORED: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class Matrix(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("out", ctypes.c_int64),
        ("in_", ctypes.c_int64),
        ("kind", ctypes.c_int64),
    ]


class Block(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("attention_norm", "query_scale", "key_scale", "mlp_norm")),
        *((name, Matrix) for name in ("qkv", "out", "mlp_in", "mlp_out")),
    ]


class Segment(ctypes.Structure):
    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("kind", ctypes.c_int64),
    ]


@functools.cache
def load() -> ctypes.CDLL:
    """The library, built when this machine does not have it yet. Raises native.Unavailable."""
    library = native.library(SOURCE, "sampling kernels")
    library.lanes.restype = library.panel_width.restype = ctypes.c_int64
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    signatures: dict[str, list[Any]] = {
        "pack": [pointer, count, count, count, pointer],
        "trunk": [pointer, *[count] * 3, pointer, count, count, *[pointer] * 3, count, pointer, count],
        "norm_and_product": [pointer, count, *[pointer] * 4, count],
        "depth_head": [pointer, count, *[pointer] * 6, count],
        "draw": [pointer, count, count, pointer, pointer, count],
    }
    for name, types in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library


class Packed:
    """A matrix (out, in) in the order in which the kernels read it, and in the precision in which it is kept.

    int8: each output has its scale, its largest weight is 127. What it is multiplied with is rounded row by row, to
    4095 steps for the largest number, and the products are whole numbers. bfloat16: so is what it is multiplied with,
    on processors that multiply in it, and sums are float32; elsewhere products are float32, as those of float32 are.
    """

    def __init__(self, weight: Tensor, precision: Precision) -> None:
        weight = weight.detach().float().contiguous()
        out, in_ = weight.shape
        self.scale: Tensor | None = None
        if precision == "int8":
            self.scale = (weight.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
            weight = (weight / self.scale[:, None]).round()
        library = load()
        width = library.panel_width()
        rows = in_ if precision == "float32" else in_ + in_ % 2  # in pairs
        self.data = torch.zeros(-(-out // width) * rows * width, dtype=STORED[precision])
        library.pack(weight.data_ptr(), out, in_, KINDS[precision], self.data.data_ptr())
        scale = None if self.scale is None else self.scale.data_ptr()
        self.matrix = Matrix(self.data.data_ptr(), scale, out, in_, KINDS[precision])


def draw(logits: Tensor, words: Tensor) -> Tensor:
    """`noise.draw_with` on a CPU: logits (N, K) and words (N, 2) int32 -> codes (N,) int64. Raises Unavailable."""
    library = load()
    logits, words = logits.detach().float().contiguous(), words.contiguous()
    codes = torch.empty(len(logits), dtype=torch.int64)
    library.draw(logits.data_ptr(), *logits.shape, words.data_ptr(), codes.data_ptr(), torch.get_num_threads())
    return codes
