"""Builds `kernels.cpp` with the machine's own compiler, once, and calls it: steps of the GPT prior on a CPU.

The library is made for this processor and kept in the user's cache folder ($XDG_CACHE_HOME/tessera, by default
~/.cache/tessera) under a name that says of what source, compiler and processor. It needs nothing but a C++ compiler
(g++ or clang++, or what $CXX names); without one `load()` raises Unavailable and the caller goes on without it.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = [
    "-O2",
    "-ftree-vectorize",
    "-march=native",
    "-std=c++17",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]
LINK = ["-fopenmp", "-shared", "-fPIC"]
PATIENCE = 180  # seconds for the compiler

Precision = Literal["float32", "bfloat16", "int8"]
KINDS: dict[Precision, int] = {"float32": 0, "bfloat16": 1, "int8": 2}
STORED: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class Unavailable(RuntimeError):
    """The kernels cannot be built or loaded here. The message says why, in one clause."""


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


def load() -> ctypes.CDLL:
    """The library, built when this machine does not have it yet. Raises Unavailable, without trying again."""
    library = _load()
    if isinstance(library, str):
        raise Unavailable(library)
    return library


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    try:
        library = ctypes.CDLL(str(_built()))
    except Unavailable as error:
        return str(error)
    except OSError as error:
        return f"the compiled kernels do not load ({error})"
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


def _built() -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise Unavailable("there is no C++ compiler on this machine")
    key = hashlib.sha256()
    for part in (SOURCE.read_bytes(), " ".join([compiler, *FLAGS, *LINK]).encode(), _processor().encode()):
        key.update(part)
    folder = cache_folder()
    library = folder / f"kernels-{key.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    print("building the sampling kernels for this processor, once", file=sys.stderr)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made = Path(place) / library.name
            command = [*compiler.split(), *FLAGS, *LINK, "-o", str(made), str(SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
            if done.returncode:
                reason = next((line for line in done.stderr.splitlines() if "error" in line), "no reason given")
                raise Unavailable(f"{compiler} cannot build the sampling kernels ({reason.strip()})")
            made.replace(library)  # whole or not at all, also when two processes build at once
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the sampling kernels could not be built in {folder} ({error})") from None
    return library


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tessera"


def _processor() -> str:
    """What -march=native depends on: a cache folder can be shared by different machines."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return platform.machine() + line
    except OSError:
        pass
    return platform.machine() + platform.processor() + platform.node()


class Packed:
    """A matrix (out, in) in the order in which the kernels read it, and in the precision in which it is kept.

    int8: each output has its scale, its largest weight is 127. What it is multiplied with is rounded row by row, to
    4095 steps for the largest number, and the products are whole numbers; otherwise they are float32.
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
        rows = in_ + in_ % 2 if precision == "int8" else in_
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
