"""Reads a pickled torch checkpoint without running anything that it names.

A pickle is a program that may call any function. This reader knows a handful of names, those that put tensors and
ordered dictionaries together; every other name becomes an inert placeholder, which takes whatever it is called with or
filled with and does nothing. So a training checkpoint that drags its framework's classes along, or a whole pickled
module, gives its tensors although nothing of it is imported. Only the zip container (torch 1.6 and later) is read.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import InputError


def read_pickle(path: Path) -> Any:
    """The object in `path`, with tensors on the CPU and `Inert` in place of what this reader does not know.

    Raises InputError when the file is damaged or of another kind.
    """
    try:
        with zipfile.ZipFile(path) as file:
            (name,) = [name for name in file.namelist() if name.endswith("data.pkl")]
            with file.open(name) as opened:
                return _Reader(opened, file, name.removesuffix("data.pkl")).load()
    except InputError:
        raise
    except Exception as error:  # a broken pickle can fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{path} is damaged or not a torch checkpoint ({reason}); download it again") from None


def module_tensors(module: Any) -> dict[str, Tensor]:
    """The parameters and buffers of a pickled module and of all modules inside it, named as `state_dict` names them."""
    found: dict[str, Tensor] = {}
    waiting = [("", module, 0)]
    while waiting:
        prefix, inner, depth = waiting.pop()
        state = inner.state if isinstance(inner, Inert) and isinstance(inner.state, dict) else {}
        for kind in ("_parameters", "_buffers"):
            tensors = state.get(kind)
            if isinstance(tensors, dict):
                found |= {prefix + name: value for name, value in tensors.items() if isinstance(value, Tensor)}
        modules = state.get("_modules")
        if isinstance(modules, dict) and depth < 50:  # a module inside itself would have no end
            waiting += [(f"{prefix}{name}.", value, depth + 1) for name, value in modules.items()]
    return found


class Inert:
    """An object of a class that was not imported; pickles can make, call and fill it, to no effect but `state`."""

    state: Any = None

    def __new__(cls, *arguments: Any, **options: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __call__(self, *arguments: Any, **options: Any) -> "Inert":
        return Inert()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass


class _Tensor:
    """Stands for `torch._utils._rebuild_tensor_v2`; an object without attributes, which a pickle cannot change."""

    __slots__ = ()

    def __call__(self, storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
        if any(step < 0 for step in (offset, *size, *stride)):
            raise ValueError(f"a tensor of size {size} and stride {stride} at {offset}")
        return storage.as_strided(size, stride, offset)  # refuses what lies outside of the storage


class _Parameter:
    """Stands for `torch._utils._rebuild_parameter`."""

    __slots__ = ()

    def __call__(self, data: Tensor, *_: Any) -> Tensor:
        return data


KNOWN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _Tensor(),
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor(),
    ("torch._utils", "_rebuild_parameter"): _Parameter(),
}
STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Reader(pickle.Unpickler):
    def __init__(self, opened: Any, file: zipfile.ZipFile, prefix: str) -> None:
        super().__init__(opened, encoding="utf-8")
        self._file, self._prefix = file, prefix
        self._classes: dict[tuple[str, str], type[Inert]] = {}
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        return self._classes.setdefault((module, name), type(name, (Inert,), {"__module__": module}))

    def persistent_load(self, pid: Any) -> Tensor:
        """The storage that ('storage', dtype, key, device, number of elements) names, as a flat tensor."""
        kind, dtype, key, _, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError(f"it holds a {kind} of {dtype}")
        if key not in self._storages:
            entry = self._file.getinfo(f"{self._prefix}data/{key}")
            if entry.file_size != numel * dtype.itemsize or entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"storage {key} has {entry.file_size} bytes, not {numel} x {dtype.itemsize}")
            data = bytearray(self._file.read(entry))
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[key]
