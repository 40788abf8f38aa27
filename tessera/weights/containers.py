"""What foreign checkpoints come in: one file, shards, a folder of DeepSpeed's, an archive; and what stands in for one.

Every file and folder that cannot be read is refused in one sentence that says what to do with it.
"""

import errno
import gzip
import io
import os
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tessera.errors import InputError
from tessera.files import read_json_object
from tessera.weights.pickles import most_bytes

STATES = ("*_model_states.pt", "checkpoint/*_model_states.pt", "global_step*/*_model_states.pt")  # DeepSpeed's
SHARD = re.compile(r"(?P<start>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\.\w+)")
LFS = b"version https://git-lfs.github.com/spec/"
PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--", b'{"error"')
PACKED = {  # by how they begin
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7-Zip",
    b"Rar!": "RAR",
}
LARGEST_READ = 2**24  # bytes at once from an archive: its headers are read whole


def is_checkpoint(path: Path) -> bool:
    """Whether it is a file, or a folder that stands for one."""
    return path.is_file() or (path.is_dir() and bool(_states(path) or _distributed(path)))


def matching(source: Path, pattern: str) -> list[Path]:
    """The checkpoints and other files below the folder `source` that match; or `source`, if it is one and its name
    does."""
    if is_checkpoint(source):
        return [source] if fnmatch(source.name, pattern.rpartition("/")[2]) else []
    return sorted(path for path in source.glob(pattern) if is_checkpoint(path))


def by_checkpoint(paths: Iterable[Path]) -> list[Path]:
    """One of the files of each checkpoint: of shards the first, of others themselves."""
    first: dict[Path, Path] = {}
    for path in paths:
        first.setdefault(whole(path)[0], path)
    return list(first.values())


def whole(path: Path) -> list[Path]:
    """All files of the checkpoint that `path` is, or is a shard or the index of. Raises InputError if one is missing.

    Shards are told by their names, `*-00001-of-00002.*`, or by an index in their folder that lists them.
    """
    if path.name.endswith(".index.json"):
        return _indexed(path)
    if not path.is_file():
        return [path]
    named = SHARD.fullmatch(path.name)
    if named:
        names = [
            f"{named['start']}-{i:05}-of-{named['count']}{named['end']}" for i in range(1, int(named["count"]) + 1)
        ]
        return _beside(path, names, f"{path} is one of {len(names)} shards")
    for index in sorted(path.parent.glob(f"*{path.suffix}.index.json")):
        if path in (shards := _indexed(index)):
            return shards
    return [path]


def _indexed(index: Path) -> list[Path]:
    refuse_stand_in(index)
    names = read_json_object(index, "get the file again").get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index} has no weight_map that names files; get the file again")
    return _beside(index, sorted(set(names.values())), f"{index} lists {len(set(names.values()))} files")


def _beside(path: Path, names: Sequence[str], what: str) -> list[Path]:
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise InputError(f"{path} names '{outside[0]}', which is no file beside it; get the file again")
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise InputError(f"{what}, and {missing[0]} is not beside it; get all of them")
    return [path.parent / name for name in names]


# Folders --------------------------------------------------------------------------------------------------------------


def states(folder: Path) -> Path:
    """The file of weights in a folder of DeepSpeed's. Raises InputError where there is none that is whole."""
    found = _states(folder)
    if not found:
        if _distributed(folder):
            raise InputError(
                f"{folder} is a checkpoint of torch.distributed, split over processes; join it with `python -m "
                f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} joined.pt` and give joined.pt"
            )
        raise InputError(f"{folder} is not a checkpoint; give the path of a file")
    if any("zero_pp_rank" in path.name for path in found):
        raise InputError(
            f"{folder} is split over processes (DeepSpeed ZeRO-3); join it with its own `python zero_to_fp32.py . "
            "joined` in that folder and give what that writes"
        )
    if len(found) > 1:
        listed = ", ".join(str(path.relative_to(folder)) for path in found[:3])
        raise InputError(f"{folder} holds {len(found)} files of weights ({listed}); give the one to be converted")
    return found[0]


def _states(folder: Path) -> list[Path]:
    return next((files for pattern in STATES if (files := sorted(folder.glob(pattern)))), [])


def _distributed(folder: Path) -> bool:
    return (folder / ".metadata").is_file() and any(folder.glob("*.distcp"))


# Files ----------------------------------------------------------------------------------------------------------------


def refuse_stand_in(path: Path) -> None:
    """Raises InputError when the file is empty, a Git LFS pointer, a web page, or packed: not what its name says."""
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not text:
        raise InputError(f"{path} is empty; download it again")
    if text.startswith(LFS):
        raise InputError(
            f"{path} is a Git LFS pointer and not the file itself; run `git lfs pull` in its folder, or download it"
        )
    if text.startswith(PAGES):
        raise InputError(
            f"{path} is a web page or an error message of a server, not the file; download it again, logged in where "
            "the page asks for it"
        )
    for start, kind in PACKED.items():
        if head.startswith(start):
            raise InputError(f"{path} is packed ({kind}); unpack it and give what is inside")
    if head[257:262] == b"ustar":
        if head.split(b"\0")[0] in (b"sys_info", b"pickle", b"tensors", b"storages"):
            raise InputError(f"{path} was written by torch 0.1; load and save it with a torch of 2018 to 2025 first")
        raise InputError(f"{path} is an archive; unpack it and give the folder")


def refuse_other_zip(path: Path) -> None:
    """Raises InputError for a zip file that holds no checkpoint's pickle; nothing for what is not a zip file."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
    except Exception as error:  # a broken one can fail in any way
        raise InputError(f"{path} is damaged or not a torch checkpoint ({error}); download it again") from None
    if any(name.endswith("constants.pkl") for name in names):
        raise InputError(
            f"{path} is a TorchScript program; save its weights with torch.save(torch.jit.load('{path.name}')"
            ".state_dict(), 'weights.pt') and give weights.pt"
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise InputError(f"{path} is a zip archive and not a torch checkpoint; unpack it and give what is inside")


# Archives -------------------------------------------------------------------------------------------------------------


@contextmanager
def unpacked(sources: Sequence[Path]) -> Iterator[list[Path]]:
    """`sources` with a folder of its content in place of each tar archive, for as long as the block runs.

    The folders lie beside their archives where that can be written to, since they can be large. An archive that would
    unpack to more than `most_bytes` of its size is refused before that is written.
    """
    with ExitStack() as stack:
        places = []
        for source in sources:
            if source.name.endswith((".tar", ".tar.gz", ".tgz")) and source.is_file():
                beside = source.parent if os.access(source.parent, os.W_OK) else None
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".unpacked.", dir=beside))
                _unpack(source, folder)
                places.append(Path(folder))
            else:
                places.append(source)
        yield places


def _unpack(source: Path, folder: str) -> None:
    limit = most_bytes(source.stat().st_size)
    try:
        with source.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(source) if packed else source.open("rb") as plain:
            limited: Any = _Limited(plain, limit, str(source))
            with tarfile.open(fileobj=limited, mode="r:") as archive:
                total = 0
                for member in archive:
                    total += member.size  # of a file with holes what it fills
                    if total > limit:
                        raise InputError(_too_large(str(source), limit))
                    archive.extract(member, folder, filter="data")
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError) as error:
        if isinstance(error, InputError):
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise InputError(
                f"there is not enough space to unpack {source}; unpack it elsewhere and give the folder"
            ) from None
        raise InputError(f"{source} is not a whole archive ({error}); download it again") from None


class _Limited:
    """A file opened for reading of which no more than `limit` bytes are read or passed over."""

    def __init__(self, file: io.BufferedIOBase, limit: int, name: str) -> None:
        self.file, self.limit, self.name, self.mode = file, limit, name, "rb"

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > LARGEST_READ or self.file.tell() + size > self.limit + LARGEST_READ:
            raise InputError(_too_large(self.name, self.limit))
        return self.file.read(size)

    def seek(self, position: int, whence: int = 0) -> int:
        if whence != 0 or position > self.limit + LARGEST_READ:
            raise InputError(_too_large(self.name, self.limit))
        return self.file.seek(position)

    def tell(self) -> int:
        return self.file.tell()


def _too_large(name: str, limit: int) -> str:
    return f"{name} would unpack to more than {limit:,} bytes, far more than weights of its size; download it again"
