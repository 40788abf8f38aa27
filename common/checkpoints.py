"""Checkpoints of other projects: named tensors in safetensors files or torch pickles, read without running any code."""

import os
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from common.errors import InputError
from common.pickles import Inert, module_tensors, read_pickle

WRAPPERS = ("model", "module", "state_dict")  # entries that training frameworks keep weights under, in the order tried


def find_files(sources: Sequence[Path], patterns: Sequence[str]) -> list[Path]:
    """The files among `sources`, and of each folder among them those of the first pattern that any file matches."""
    found = []
    for source in sources:
        if source.is_dir():
            matches = (sorted(source.glob(pattern)) for pattern in patterns)
            found += next((files for files in matches if files), [])
        elif source.is_file():
            found.append(source)
        else:
            raise InputError(f"{source} is neither a file nor a folder; give the checkpoint's path")
    return found


def pick(sources: Sequence[Path], *patterns: str) -> Path | None:
    """The first file of the first of `patterns` that any file matches: by its name, or by its path below a folder."""
    for pattern in patterns:
        for source in sources:
            if source.is_dir():
                found = sorted(path for path in source.glob(pattern) if path.is_file())
            else:
                found = [source] if fnmatch(source.name, pattern.rpartition("/")[2]) else []
            if found:
                return found[0]
    return None


def need(sources: Sequence[Path], what: str, *patterns: str) -> Path:
    """As `pick`. Raises InputError that ends with `what` where there is no such file."""
    found = pick(sources, *patterns)
    if found is None:
        given = ", ".join(str(source) for source in sources)
        raise InputError(f"there is no {patterns[0].rpartition('/')[2]} in {given}; {what}")
    return found


@contextmanager
def unpacked(sources: Sequence[Path]) -> Iterator[list[Path]]:
    """`sources` with a folder of its content in place of each tar archive, for as long as the block runs.

    The folders lie beside their archives where that can be written to, since they can be large.
    """
    with ExitStack() as stack:
        places = []
        for source in sources:
            if source.name.endswith((".tar", ".tar.gz", ".tgz")) and source.is_file():
                beside = source.parent if os.access(source.parent, os.W_OK) else None
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".unpacked.", dir=beside))
                try:
                    with tarfile.open(source) as archive:
                        archive.extractall(folder, filter="data")
                except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
                    raise InputError(f"{source} is not a whole archive ({error}); download it again") from None
                places.append(Path(folder))
            else:
                places.append(source)
        yield places


def read_tensors(paths: Iterable[Path], keep: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors that `keep` takes of all `paths` by their names; of a training checkpoint the model's weights."""
    found: dict[str, Tensor] = {}
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path} is not a file; give a checkpoint's path")
        found |= _safetensors(path, keep) if path.suffix == ".safetensors" else _pickled(path, keep)
    return found


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML or JSON: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold keys and values, got {type(content).__name__}")
    return content


def section(settings: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The mapping below `keys`, empty where there is none."""
    inner: Any = settings
    for key in keys:
        inner = inner.get(key) if isinstance(inner, dict) else None
    return inner if isinstance(inner, dict) else {}


class Weights:
    """The tensors of a checkpoint, for a converter that must account for each: none missing, none left over."""

    def __init__(self, tensors: dict[str, Tensor], where: str, ignored: str = "") -> None:
        """`where` names the checkpoint in messages; names that match `ignored` are of no use to anyone but training."""
        pattern = re.compile(ignored or "(?!)")
        self.tensors = {name: tensor for name, tensor in tensors.items() if not pattern.match(name)}
        self.where = where

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises InputError when there is no such tensor."""
        if name not in self.tensors:
            raise InputError(f"{self.where} lacks the weight '{name}'; give the whole checkpoint of the right family")
        return tuple(self.tensors[name].shape)

    def split(self, name: str, sizes: Sequence[int], names: Sequence[str]) -> None:
        """Puts slices of the first axis of a tensor, `sizes` long, in its place under `names`."""
        if self.shape(name)[0] != sum(sizes):
            raise InputError(f"{self.where}: '{name}' has {self.shape(name)[0]} rows, but {sum(sizes)} were expected")
        self.tensors |= dict(zip(names, self.tensors.pop(name).split(list(sizes)), strict=True))

    def count(self, name: str) -> int:
        """How many there are of `name`, which has a `{}` for their number."""
        number = 0
        while name.format(number) in self.tensors:
            number += 1
        return number

    def assemble(self, wanted: dict[str, tuple[str, ...]], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Our names and shapes, each from one tensor of the checkpoint or several one after another, as float32.

        Raises InputError that names what is missing, left over, or of another shape.
        """
        needed = [name for names in wanted.values() for name in names]
        _refuse(f"{self.where} lacks", [name for name in needed if name not in self.tensors])
        _refuse(f"{self.where} has, beyond what this family knows,", sorted(self.tensors.keys() - set(needed)))
        made = {}
        for ours, names in wanted.items():
            tensor = torch.cat([self.tensors[name].float() for name in names])
            if tensor.ndim == 2 and len(shapes[ours]) == 4:  # a linear layer over channels is a 1x1 convolution
                tensor = tensor[:, :, None, None]
            if tuple(tensor.shape) != shapes[ours]:
                raise InputError(
                    f"{self.where}: '{names[0]}' has shape {tuple(self.tensors[names[0]].shape)}, which does not fit "
                    f"the {shapes[ours]} that the other weights ask for; check that all are of one checkpoint"
                )
            made[ours] = tensor.contiguous()
        return made


def _refuse(what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise InputError(f"{what} {len(names)} weights: {', '.join(names[:8])}{more}; check the family and the file")


def _safetensors(path: Path, keep: Callable[[str], bool]) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys() if keep(name)}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); download it again") from None


def _pickled(path: Path, keep: Callable[[str], bool]) -> dict[str, Tensor]:
    content = _unpickled(path)
    if isinstance(content, Inert):
        content = module_tensors(content)
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path} holds no named tensors; give a checkpoint with weights")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor) and keep(str(name))}


def _unpickled(path: Path) -> Any:
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as file:
            if any(name.endswith("constants.pkl") for name in file.namelist()):
                raise InputError(f"{path} is a TorchScript program; give the weights as a plain checkpoint")
    elif tarfile.is_tarfile(path):
        raise InputError(f"{path} is an archive; unpack it and give the folder")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # damaged, or it names classes that torch does not know
        if zipped:
            return read_pickle(path)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise InputError(f"{path} is damaged or not a torch checkpoint ({reason}); download it again") from None
