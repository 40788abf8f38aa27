"""Reads a pickled torch checkpoint without running anything that it names, and without believing what it says of sizes.

A pickle is a program that may call any function. This reader knows a handful of names, those that put tensors and
ordered dictionaries together; every other name becomes an inert placeholder, which takes whatever it is called with or
filled with and keeps no more than its state and its items. So a training checkpoint that drags its framework's classes
along, or a whole pickled module, gives its tensors although nothing of it is imported.

Two containers are read: zip files (torch 1.6 and later), whose entries may be compressed, and what came before: a magic
number, a version, facts about the machine, the pickle, the names of the storages and their bytes. Storages that lie in
the file as they are, and aligned, are mapped and not copied.

What is read takes memory in proportion to the file: see `most_bytes`. Python's own unpickler is used, and not the one
in C, because that one allocates what a number in the pickle asks for (a memo of 2^32 entries in five bytes).
"""

import io
import mmap
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tessera.errors import InputError

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # what torch began its files with before 1.6
MOST_TIMES, SPARE = 16, 2**26  # of a file's size, and bytes: well above what compression gains on weights
MOST_MODULES = 100_000
PICKLE_SPARE = 2**20  # bytes: a byte of a pickle can become an object of 200


def most_bytes(size: int) -> int:
    """What the content of a file of `size` bytes may take in memory or unpacked."""
    return MOST_TIMES * size + SPARE


def read_pickle(path: Path, tensors: bool = True) -> Any:
    """The object in `path`, with tensors on the CPU and `Inert` in place of what this reader does not know.

    Without `tensors` they are `Inert` too, and their bytes are not looked at. Raises InputError when the file is
    damaged or of another kind, or asks for more memory than a file of its size may.
    """
    try:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return _zipped(path, memory, tensors) if memory[:2] == b"PK" else _before_zip(memory, tensors)
    except InputError:
        raise
    except Exception as error:  # a broken pickle can fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{path} is damaged or not a torch checkpoint ({reason}); download it again") from None


def module_tensors(module: Any) -> dict[str, Tensor]:
    """The parameters and buffers of a pickled module and of all modules inside it, named as `state_dict` names them."""
    found: dict[str, Tensor] = {}
    waiting, looked_at = [("", module, 0)], 0
    while waiting:
        prefix, inner, depth = waiting.pop()
        looked_at += 1
        state = inner.state if isinstance(inner, Inert) and isinstance(inner.state, dict) else {}
        for kind in ("_parameters", "_buffers"):
            tensors = state.get(kind)
            if isinstance(tensors, dict):
                found |= {f"{prefix}{name}": value for name, value in tensors.items() if isinstance(value, Tensor)}
        modules = state.get("_modules")
        if isinstance(modules, dict) and depth < 50:  # a module inside itself would have no end
            waiting += [(f"{prefix}{name}.", value, depth + 1) for name, value in modules.items()]
        if looked_at + len(waiting) > MOST_MODULES:  # nor one that has itself several times
            raise InputError("a pickled module holds itself; give the weights as a plain checkpoint")
    return found


class Inert:
    """An object of a class that was not imported; pickles can make, call and fill it, to no other effect."""

    state: Any = None

    def __new__(cls, *arguments: Any, **options: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments = arguments
        self.entries: dict[Any, Any] = {}

    def __call__(self, *arguments: Any, **options: Any) -> "Inert":
        return Inert()

    @classmethod
    def kind(cls) -> str:
        """The class that it stands for."""
        return f"{cls.__module__}.{cls.__name__}"


# Tensors --------------------------------------------------------------------------------------------------------------

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
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Any:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    if not isinstance(storage, Tensor):
        return Inert()
    if any(step < 0 for step in (offset, *size, *stride)):
        raise ValueError(f"a tensor of size {size} and stride {stride} at {offset}")
    return storage.as_strided(size, stride, offset)  # refuses what lies outside of the storage


def _tensor_of_dtype(
    storage: Any, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Any:
    """torch._utils._rebuild_tensor_v3, whose storage is of bytes."""
    if not isinstance(storage, Tensor) or not isinstance(dtype, torch.dtype):
        return Inert()
    return _tensor(storage.view(dtype), offset, size, stride)


def _first(value: Any, *_: Any) -> Any:
    """torch._utils._rebuild_parameter and _rebuild_parameter_with_state."""
    return value


def _from_type(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """torch._tensor._rebuild_from_type_v2: a tensor with attributes, or of a class of its own."""
    return function(*arguments) if function in FUNCTIONS.values() else Inert()


def _ordered(pairs: Any = ()) -> "OrderedDict[Any, Any]":
    """collections.OrderedDict, filled only from the list of pairs that Python 2 wrote."""
    result: OrderedDict[Any, Any] = OrderedDict()
    if isinstance(pairs, list):
        for pair in pairs:
            if isinstance(pair, list | tuple) and len(pair) == 2 and _plain(pair[0]):
                result[pair[0]] = pair[1]
        pairs.clear()  # read once: a list that is read again and again would be a copy each time
    return result


FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
}


def _plain(key: Any) -> bool:
    """Whether it is the key of a checkpoint's dictionary. The hash of tuples in tuples could take for ever."""
    return isinstance(key, str | int | float | bytes | None) or (
        isinstance(key, tuple) and all(isinstance(part, str | int | float | bytes | None) for part in key)
    )


# The pickle -----------------------------------------------------------------------------------------------------------

Storage = Callable[[torch.dtype, str, int, Any], Any]  # dtype, key, number of elements, a part of it or None


class _Reader(pickle._Unpickler):
    """A pickle of protocol 0 to 5 that can do nothing but make plain values, `Inert` objects and tensors."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]
    append: Callable[[Any], None]

    def __init__(self, file: Any, storage: Storage) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self._storage = storage
        self._classes: dict[tuple[str, str], type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in FUNCTIONS:
            return FUNCTIONS[module, name]
        if module in ("torch", "torch.cuda", "torch.storage"):
            if name in STORAGES:
                return STORAGES[name]
            if isinstance(dtype := getattr(torch, name, None), torch.dtype):
                return dtype
        if (module, name) not in self._classes:
            self._classes[module, name] = type(name, (Inert,), {"__module__": module})
        return self._classes[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """The storage that ('storage', dtype, key, device, number of elements[, part]) names, as a flat tensor."""
        kind, *rest = pid
        if kind == "module":  # a class with its source code
            return rest[0]
        dtype, key, _, numel, *part = rest
        if kind != "storage" or not isinstance(numel, int) or not isinstance(key, str) or numel < 0:
            raise ValueError(f"it holds a {kind} of {numel}")
        if not isinstance(dtype, torch.dtype):  # quantized numbers
            return Inert()
        return self._storage(dtype, key, numel, part[0] if part else None)

    def get_extension(self, code: int) -> None:
        self.append(Inert())

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.append(_call(function, arguments, {}))

    def load_newobj(self) -> None:
        self.load_reduce()

    def load_newobj_ex(self) -> None:
        options, arguments, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.append(_call(function, arguments, options))

    def _instantiate(self, kind: Any, arguments: Any) -> None:
        self.append(_call(kind, tuple(arguments), {}))

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):
            whole = isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], dict)
            self.stack[-1].state = state[0] if whole else state

    def load_append(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, values: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def load_setitems(self) -> None:
        self._fill(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._fill(items)

    def _fill(self, items: list[Any]) -> None:
        target = self.stack[-1].entries if isinstance(self.stack[-1], Inert) else self.stack[-1]
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                if _plain(key):
                    target[key] = value

    def load_additems(self) -> None:  # sets hold no weights
        self.pop_mark()

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(Inert())

    def load_bytearray8(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }


def _call(function: Any, arguments: Any, options: Any) -> Any:
    """What a pickle may call: the functions above and classes that stand for others; all else gives a placeholder."""
    inert = isinstance(function, type) and issubclass(function, Inert)
    if not isinstance(arguments, tuple) or not (inert or function in FUNCTIONS.values()):
        return Inert()
    return function(*arguments)


def _ignored(dtype: torch.dtype, key: str, numel: int, part: Any) -> Any:
    return Inert()


# Containers -----------------------------------------------------------------------------------------------------------


def _zipped(path: Path, memory: mmap.mmap, tensors: bool) -> Any:
    size = len(memory)
    with zipfile.ZipFile(path) as file:
        (name,) = [name for name in file.namelist() if name.endswith("data.pkl")]
        prefix = name.removesuffix("data.pkl")
        if f"{prefix}byteorder" in file.namelist() and file.read(f"{prefix}byteorder").strip() != _byte_order():
            raise ValueError("it was written on a machine with another order of bytes")
        entry = file.getinfo(name)
        if entry.file_size > MOST_TIMES * size + PICKLE_SPARE:
            raise ValueError(f"its pickle of {entry.file_size} bytes is too large for a file of {size}")
        unpacked = 0
        storages: dict[str, Tensor] = {}

        def storage(dtype: torch.dtype, key: str, numel: int, part: Any) -> Tensor:
            nonlocal unpacked
            if key not in storages:
                entry = file.getinfo(f"{prefix}data/{key}")
                if entry.file_size != numel * dtype.itemsize:
                    raise ValueError(f"storage {key} has {entry.file_size} bytes, not {numel} x {dtype.itemsize}")
                if entry.compress_type == zipfile.ZIP_STORED:
                    storages[key] = _mapped(memory, _begin(memory, entry), dtype, numel)
                else:
                    unpacked += entry.file_size
                    if unpacked > most_bytes(size):
                        raise ValueError(f"its storages are too large for a file of {size} bytes")
                    storages[key] = _flat(bytearray(_inflated(file, entry)), 0, dtype, numel)
            return storages[key]

        return _Reader(io.BytesIO(_inflated(file, entry)), storage if tensors else _ignored).load()


def _inflated(file: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """An entry's bytes, as many as it says and no more."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{entry.filename} is compressed in a way that torch does not know")
    with file.open(entry) as opened:
        data = opened.read(entry.file_size)
    if len(data) != entry.file_size:
        raise ValueError(f"{entry.filename} has {len(data)} bytes, not {entry.file_size}")
    return data


def _begin(memory: mmap.mmap, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored entry begin: behind its local header, a name and a field of varying lengths."""
    header = memory[entry.header_offset : entry.header_offset + 30]
    if header[:4] != b"PK\x03\x04" or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
        raise ValueError(f"{entry.filename} has a broken header")
    return entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _before_zip(memory: mmap.mmap, tensors: bool) -> Any:
    """The pickle is read twice: for the sizes of the storages, and once it is known where they lie."""
    with _own_reason("it does not begin as torch's files do"):
        begins = _Reader(memory, _ignored).load() == MAGIC and _Reader(memory, _ignored).load() == VERSION
    if not begins:
        raise ValueError("it does not begin as torch's files do")
    machine = _Reader(memory, _ignored).load()
    if isinstance(machine, dict) and machine.get("little_endian", True) != (sys.byteorder == "little"):
        raise ValueError("it was written on a machine with another order of bytes")
    begin = memory.tell()
    asked: dict[str, tuple[torch.dtype, int]] = {}

    def note(dtype: torch.dtype, key: str, numel: int, part: Any) -> Inert:
        asked.setdefault(key, (dtype, numel))
        return Inert()

    content = _Reader(memory, note).load()
    if not tensors:
        return content
    keys = _Reader(memory, _ignored).load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("it has no list of storages")
    places: dict[str, int] = {}
    position = memory.tell()
    for key in keys:
        numel = int.from_bytes(memory[position : position + 8], "little")
        if key not in asked:  # of quantized numbers, whose width is not known here
            raise ValueError(f"storage {key} is of a kind that is not known")
        if numel != asked[key][1]:
            raise ValueError(f"storage {key} has {numel} elements, not {asked[key][1]}")
        places[key] = position + 8
        position += 8 + numel * asked[key][0].itemsize
    storages: dict[tuple[str, int, int], Tensor] = {}

    def storage(dtype: torch.dtype, key: str, numel: int, part: Any) -> Tensor:
        _, offset, length = part if part is not None else (None, 0, numel)
        if not (isinstance(offset, int) and isinstance(length, int) and 0 <= offset <= offset + length <= numel):
            raise ValueError(f"a part of storage {key} lies outside of it")
        if (dtype, numel) != asked[key]:
            raise ValueError(f"storage {key} is of two kinds")
        if (key, offset, length) not in storages:
            if len(storages) > 2 * len(keys) + 64:  # each may be copied
                raise ValueError("it has more parts of storages than storages")
            begin = places[key] + offset * dtype.itemsize
            storages[key, offset, length] = _mapped(memory, begin, dtype, length)
        return storages[key, offset, length]

    memory.seek(begin)
    return _Reader(memory, storage).load()


def _mapped(memory: mmap.mmap, begin: int, dtype: torch.dtype, numel: int) -> Tensor:
    """`numel` numbers that lie in the file from `begin` on, as they lie there if they are aligned, else a copy."""
    end = begin + numel * dtype.itemsize
    if end > len(memory):
        raise ValueError(f"it ends {end - len(memory)} bytes too early")
    aligned = begin % dtype.itemsize == 0
    return _flat(memory if aligned else bytearray(memory[begin:end]), begin if aligned else 0, dtype, numel)


def _flat(data: Any, begin: int, dtype: torch.dtype, numel: int) -> Tensor:
    return torch.frombuffer(data, dtype=dtype, count=numel, offset=begin) if numel else torch.empty(0, dtype=dtype)


def _byte_order() -> bytes:
    return sys.byteorder.encode()


@contextmanager
def _own_reason(reason: str) -> Iterator[None]:
    try:
        yield
    except Exception:
        raise ValueError(reason) from None
