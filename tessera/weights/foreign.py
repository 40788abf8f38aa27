"""Checkpoints of other projects: named tensors in safetensors files or torch pickles, read without running any code.

What the files are is told by their content, not by their names; see containers.py for what they come in, pickles.py for
how they are read, averages.py for which weights are taken where there are two kinds.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.errors import InputError
from tessera.files import read_json_object, read_yaml
from tessera.weights.choice import chosen
from tessera.weights.containers import (
    by_checkpoint,
    is_checkpoint,
    matching,
    refuse_other_zip,
    refuse_stand_in,
    states,
    unpacked,
    whole,
)
from tessera.weights.pickles import Inert, module_tensors, most_bytes, read_pickle

__all__ = [
    "Weights",
    "by_checkpoint",
    "find_files",
    "mentions",
    "need",
    "one_checkpoint",
    "pick",
    "pick_settings",
    "read_settings",
    "read_tensors",
    "section",
    "unpacked",
]

WRAPPERS = ("model", "module", "state_dict")  # entries that training frameworks keep weights under, in the order tried
AVERAGES = ("ema", "model_ema", "ema_state_dict", "state_dict_ema", "ema_model")  # and those of their moving average


# Files ----------------------------------------------------------------------------------------------------------------


def find_files(sources: Sequence[Path], patterns: Sequence[str]) -> list[Path]:
    """The files among `sources`, and of each folder among them those of the first pattern that any file matches."""
    found = []
    for source in sources:
        if is_checkpoint(source):
            found.append(source)
        elif source.is_dir():
            matches = (matching(source, pattern) for pattern in patterns)
            found += next((files for files in matches if files), [])
        else:
            raise InputError(f"{source} is neither a file nor a folder; give the checkpoint's path")
    return found


def pick(sources: Sequence[Path], *patterns: str) -> Path | None:
    """The first file of the first of `patterns` that any file matches: by its name, or by its path below a folder."""
    for pattern in patterns:
        for source in sources:
            if found := matching(source, pattern):
                return found[0]
    return None


def need(sources: Sequence[Path], what: str, *patterns: str) -> Path:
    """As `pick`. Raises InputError that ends with `what` where there is no such file."""
    found = pick(sources, *patterns)
    if found is None:
        given = ", ".join(str(source) for source in sources)
        raise InputError(f"there is no {patterns[0].rpartition('/')[2]} in {given}; {what}")
    return found


def one_checkpoint(found: Sequence[Path], what: str) -> Path:
    """The only checkpoint among `found`; shards of one count as one. Raises InputError that starts with `what`."""
    one = by_checkpoint(found)
    if len(one) != 1:
        listed = ", ".join(path.name for path in one[:8]) or "none"
        raise InputError(f"{what}, and {listed} was found")
    return one[0]


def pick_settings(paths: Sequence[Path], describes: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """The settings in the one of several YAML files that says something of the model; empty where there is none.

    Training tools write their own settings beside the project's. `describes` gives what a file says of the model, or
    something empty. Raises InputError when files say different things, or when the only one cannot be read.
    """
    read: list[tuple[Path, dict[str, Any]]] = []
    broken: list[InputError] = []
    for path in dict.fromkeys(paths):
        try:
            read.append((path, read_settings(path)))
        except InputError as error:
            broken.append(error)
    telling = [(path, settings) for path, settings in read if describes(settings)]
    if not telling:
        if broken:
            raise broken[0]
        return {}
    others = [path for path, settings in telling[1:] if describes(settings) != describes(telling[0][1])]
    if others:
        listed = ", ".join(str(path) for path in (telling[0][0], *others))
        raise InputError(f"{listed} describe different models; give the checkpoint and the one file that belongs to it")
    return telling[0][1]


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file."""
    refuse_stand_in(path)
    if path.suffix == ".json":
        return read_json_object(path, "get the file again")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold keys and values, got {type(content).__name__}")
    return content


def section(settings: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The mapping below `keys`, empty where there is none."""
    inner: Any = settings
    for key in keys:
        inner = inner.get(key) if isinstance(inner, dict) else None
    return inner if isinstance(inner, dict) else {}


def mentions(path: Path, pattern: re.Pattern[str]) -> bool:
    """Whether a pickled checkpoint has, outside of its tensors, a text or a class whose name `pattern` finds."""
    try:
        if not path.is_file() or _is_safetensors(path):
            return False
        content = read_pickle(path, tensors=False)
    except InputError:  # a YAML file, or one that is refused where its tensors are read
        return False
    waiting = [value for key, value in content.items() if key not in WRAPPERS] if isinstance(content, dict) else []
    visited: set[int] = set()
    while waiting and len(visited) < 100_000:
        value = waiting.pop()
        if isinstance(value, str) and pattern.search(value):
            return True
        if id(value) in visited:
            continue
        visited.add(id(value))
        if isinstance(value, Inert):
            if pattern.search(value.kind()):
                return True
            waiting += [value.state, value.entries, *value.arguments]
        elif isinstance(value, type) and issubclass(value, Inert) and pattern.search(value.kind()):
            return True
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            waiting += value
    return False


# Tensors --------------------------------------------------------------------------------------------------------------


def read_tensors(paths: Iterable[Path], keep: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors that `keep` takes of all `paths` by their names; of a training checkpoint the model's weights.

    Of a shard all the others are read too. Warns (InputWarning) where there are two kinds of weights and nobody said
    which. Raises InputError when a file is damaged, is something else, or has tensors far larger than itself.
    """
    files = list(dict.fromkeys(file for path in paths for file in whole(path)))
    raw: dict[str, Tensor] = {}
    average: dict[str, Tensor] = {}
    for file in files:
        weights, averaged = _read(file if file.is_file() else states(file))
        raw |= weights
        average |= averaged
    where = files[0].name
    kept = {name: tensor for name, tensor in chosen(raw, average, where).items() if keep(name)}
    size = sum(file.stat().st_size if file.is_file() else states(file).stat().st_size for file in files)
    asked = sum(tensor.numel() * max(tensor.element_size(), 4) for tensor in kept.values())
    if asked > most_bytes(size):
        raise InputError(
            f"{where} has {size:,} bytes but tensors of {asked:,}: it repeats what it holds; download it again "
            "or save its weights anew"
        )
    return kept


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights in a file and their moving average, each empty where there is none."""
    if _is_safetensors(path):
        return _safetensors(path), {}
    refuse_other_zip(path)
    content = read_pickle(path)
    raw = _named(content, WRAPPERS)
    average = _named(content, AVERAGES, needs_entry=True)
    if not raw and not average:
        kinds = sorted({value.kind() for value in _inside(content) if isinstance(value, Inert)})
        told = f" but objects of {', '.join(kinds[:3])}" if kinds else ""
        raise InputError(f"{path} holds no named tensors{told}; give a checkpoint with weights (a state_dict)")
    return raw, average


def _is_safetensors(path: Path) -> bool:
    """By the content: the length of a header and its first brace. By the name where the content is no zip file."""
    refuse_stand_in(path)
    with path.open("rb") as file:
        head = file.read(9)
    begins = head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size
    return begins or (path.suffix == ".safetensors" and head[:2] != b"PK")


def _inside(content: Any) -> list[Any]:
    """An object and what it has inside, two levels down."""
    found = [content]
    for value in [content, *(content.values() if isinstance(content, dict) else ())]:
        found += value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return found[:10_000]


def _named(content: Any, entries: Sequence[str], needs_entry: bool = False, depth: int = 0) -> dict[str, Tensor]:
    """The tensors of a dictionary or of a pickled module, in or below the first of `entries` that has any."""
    if depth > 4:  # it may be inside itself
        return {}
    if isinstance(content, dict):
        for entry in entries:
            inner = content.get(entry)
            if isinstance(inner, dict | Inert) and (found := _named(inner, WRAPPERS, depth=depth + 1)):
                return found
    if needs_entry:
        return {}
    if isinstance(content, Inert):
        return module_tensors(content) or _named(content.entries, entries, depth=depth + 1)
    if isinstance(content, dict):
        return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return {}


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is not a whole safetensors file ({reason}); download it again") from None


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
        pieces = {}
        for ours, names in wanted.items():
            parts = [self._finite(name) for name in names]
            if any(part.ndim == 0 or part.shape[1:] != parts[0].shape[1:] for part in parts):
                listed = ", ".join(f"'{name}' {tuple(self.tensors[name].shape)}" for name in names)
                raise InputError(f"{self.where}: {listed} do not fit together; check that all are of one checkpoint")
            tensor = torch.cat(parts)  # a copy, so that the file need not stay mapped
            if tensor.ndim == 2 and len(shapes[ours]) == 4:  # a linear layer over channels is a 1x1 convolution
                tensor = tensor[:, :, None, None]
            if tuple(tensor.shape) != shapes[ours]:
                raise InputError(
                    f"{self.where}: '{names[0]}' has shape {tuple(self.tensors[names[0]].shape)}, which does not fit "
                    f"the {shapes[ours]} that the other weights ask for; check that all are of one checkpoint"
                )
            pieces[ours] = tensor.contiguous()
        return pieces

    def _finite(self, name: str) -> Tensor:
        """A tensor as float32. Raises InputError when a number in it is none, or too large for that."""
        tensor = self.tensors[name]
        if tensor.is_complex():
            raise InputError(f"{self.where}: '{name}' holds complex numbers; check the family and the file")
        tensor = tensor.float()
        if tensor.numel() and not tensor.is_meta:
            lowest, highest = torch.aminmax(tensor)  # one pass; a NaN anywhere is both
            if not (lowest.isfinite() and highest.isfinite()):
                raise InputError(
                    f"{self.where}: the weight '{name}' is not finite: the training had failed or the file is damaged; "
                    "give another checkpoint"
                )
        return tensor


def _refuse(what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise InputError(f"{what} {len(names)} weights: {', '.join(names[:8])}{more}; check the family and the file")
