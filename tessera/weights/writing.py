"""Writing without losing anything: a file is whole or not there, and nothing is replaced that Tessera did not write.

What Tessera wrote is known by its content: `config.json` by what only ours say, a safetensors file by the mark in its
header or by the `config.json` beside it, `tokenizer.json` by our special tokens, the files of a bundle by the hashes in
its index. Whatever else is in a folder is left alone; a file that is in the way is an error that names it. Modes are
those that the umask gives. A disk that is full costs the file that did not fit, and leaves no part of it.
"""

import errno
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from hashlib import file_digest
from pathlib import Path
from typing import Any

from tessera.errors import InputError, WriteError
from tessera.paths import expand

MARK = "tessera"  # the one key in the metadata of our safetensors files; of several the library shuffles the order
UNFINISHED = "unfinished"  # the key of a head while the files that it is of are being replaced
HEADS = ("config.json", "open_clip_config.json", "adapter_config.json", "model_index.json")  # a folder is read by these
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
NAMES = (  # of the files that a folder of ours is read from
    *HEADS,
    *TOKENIZER_FILES,
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "adapter_model.safetensors",
)
PART = ".tessera-part-"  # beginning of the name of what is not finished
LARGEST_HEADER = 100_000_000  # bytes of a safetensors header; the library's own limit


# One file -------------------------------------------------------------------------------------------------------------


@contextmanager
def new_file(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """A path beside `path` to write to: the file takes its place when the block succeeds, and vanishes when it fails.

    With `sync` it is on the disk by then, so that a power cut does not cost it. Raises InputError where nothing can be
    written, WriteError when the disk is full.
    """
    path = expand(path)
    try:
        handle, name = tempfile.mkstemp(prefix=_part_name(), suffix=path.suffix, dir=path.parent)
    except OSError as error:
        _refuse(path, error)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        _finish(part, sync)
        part.replace(path)
    except BaseException as error:
        full = _disk_is_full(error, part)
        part.unlink(missing_ok=True)
        if full:
            raise WriteError(f"{path} could not be written: the disk is full; make room and start again") from None
        raise


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    with new_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Writes `content` as JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


# A folder -------------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(folder: str | Path, known: Mapping[str, str] | None = None) -> Iterator[Path]:
    """A scratch folder whose files take their places in `folder` when the block succeeds, and vanish when it fails.

    Replaced, and removed when they are none of the new ones, are files of ours alone, in `folder` and in its subfolders
    that are written to; `known` are paths in it with the hashes (`file_hash`) of files that are ours although nothing
    in them says so. All else stays. Where `folder` is a link, the folder behind it is written to. Raises InputError
    when a file that is not ours is in the way or nothing can be written there, and WriteError when the disk is full.
    """
    folder, known = expand(folder), known or {}
    refuse_foreign(folder, known)
    created = _make(folder)
    target, scratch = folder.resolve(), None
    try:
        _remove_abandoned(target)
        scratch = Path(tempfile.mkdtemp(prefix=_part_name(), dir=target))
        yield scratch
        files = sorted(path.relative_to(scratch) for path in scratch.rglob("*") if path.is_file())
        for name in files:
            _finish(scratch / name)
        stale = _stale(target, files, known)
        _settle(scratch, target, files, stale)
    except BaseException as error:
        full = _disk_is_full(error, scratch or target)
        if scratch is None and isinstance(error, OSError):
            _remove_empty(created)
            _refuse(folder, error)
        if full:
            inner = Path(str(error).partition(" could not")[0]).name if isinstance(error, WriteError) else None
            lost = inner or _newest(scratch) or "the weights"
            _discard(scratch)
            _remove_empty(created)
            raise WriteError(
                f"{lost} of {folder} could not be written: the disk is full; make room and start again"
            ) from None
        _discard(scratch)
        _remove_empty(created)
        raise
    _discard(scratch)


def refuse_foreign(folder: str | Path, known: Mapping[str, str] | None = None) -> None:
    """Raises InputError when `folder` cannot be a folder of ours: something else is there, or a file that Tessera did
    not write has the name of one that the folder would be read from. Asked before work starts."""
    folder = expand(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        what = "a link to nothing" if folder.is_symlink() and not folder.exists() else "a file"
        raise InputError(f"{folder} is {what}, not a folder; choose another folder")
    if not folder.is_dir():
        return
    for name in sorted(os.listdir(folder)):
        if any(fnmatch(name, pattern) for pattern in NAMES):
            _refuse_unless_ours(folder / name, (known or {}).get(name))


def refuse_data_folder(output: Path, data: Path, key: str) -> None:
    """Raises InputError when `output`, the value of the recipe's `key`, is the data folder itself."""
    if output.resolve() == data.resolve():
        raise InputError(f"{key}: {output} is the data folder; choose another folder, it can be one inside")


def own_folder(folder: Path, what: str) -> None:
    """Makes a folder that will hold nothing but `what` (one word), of which the writer may replace anything.

    A hidden file says so from then on. Raises InputError when the folder holds something and does not say so.
    """
    mark = folder / f".tessera-{what}"
    if folder.is_dir() and any(folder.iterdir()) and not mark.is_file():
        raise InputError(f"{folder} is not empty and was not made for {what}; choose another folder or move it away")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        _refuse(folder, error)


def is_ours(path: Path) -> bool:
    """Whether Tessera wrote the file at `path`, by its content."""
    try:
        return _is_ours(path)
    except (OSError, ValueError, RecursionError):
        return False


def file_hash(path: Path) -> str:
    """The first 16 hex digits of a file's SHA-256."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()[:16]


def safetensors_metadata(path: Path) -> dict[str, str] | None:
    """The metadata in the header of a safetensors file, None where it has none. Raises ValueError or OSError."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(LARGEST_HEADER, path.stat().st_size):
            raise ValueError("no safetensors header")
        header = json.loads(file.read(length))
    metadata: dict[str, str] | None = header.get("__metadata__") if isinstance(header, dict) else None
    return metadata


def _is_ours(path: Path) -> bool:
    beside = path.parent
    if path.name in HEADS and _object(path).keys() == {UNFINISHED}:
        return True
    match path.name:
        case "config.json":
            content = _object(path)
            autoencoder = content.get("type") == "autoencoder" and "trunk" in content
            return autoencoder or {"codebook_size", "code_shape"} <= content.keys()
        case "model_index.json":
            return "_tessera_version" in _object(path)
        case "adapter_config.json":
            return bool(re.fullmatch(r"[0-9a-f]{16}", str(_object(path).get("revision"))))
        case "open_clip_config.json":
            content, weights = _object(path), beside / "open_clip_model.safetensors"
            if _is_marked(weights):
                return True
            text = content["model_cfg"].get("text_cfg", {}) if isinstance(content.get("model_cfg"), dict) else {}
            return isinstance(text, dict) and text.get("hf_tokenizer_name") == "local"  # as earlier releases wrote
        case "tokenizer.json":
            if is_ours(beside / "open_clip_config.json"):
                return True
            model = _object(path).get("model")
            vocabulary = model.get("vocab") if isinstance(model, dict) else None
            if isinstance(vocabulary, list):  # Unigram: the place of a piece is its id
                vocabulary = {piece[0]: i for i, piece in enumerate(vocabulary[:3])}
            specials = ("<pad>", "<start>", "<end>")
            return isinstance(vocabulary, dict) and all(vocabulary.get(name) == i for i, name in enumerate(specials))
        case "tokenizer_config.json" | "special_tokens_map.json":
            return is_ours(beside / "open_clip_config.json")
        case "model.safetensors.index.json":
            files = set(_object(path).get("weight_map", {}).values())
            return is_ours(beside / "config.json") or all(is_ours(beside / name) for name in files)
        case _ if path.suffix == ".safetensors":
            # What other libraries write for us has no mark: then what lies beside says whose it is.
            return _is_marked(path) or any(is_ours(beside / head) for head in HEADS)
        case _:
            return False


def _is_marked(path: Path) -> bool:
    try:
        return MARK in (safetensors_metadata(path) or {})
    except (OSError, ValueError):
        return False


def _object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_bytes())
    return content if isinstance(content, dict) else {}


def _refuse_unless_ours(path: Path, known: str | None) -> None:
    if path.is_file() and (is_ours(path) or (known is not None and file_hash(path) == known)):
        return
    what = "a folder" if path.is_dir() else "not a file that Tessera wrote, or it was changed since"
    raise InputError(f"{path} is in the way: it is {what}; choose another folder or move it away")


def _stale(target: Path, files: list[Path], known: Mapping[str, str]) -> list[Path]:
    """Files of ours in `target` that are none of `files`. Raises InputError when a file in the way is not ours."""
    for name in files:
        if os.path.lexists(target / name):
            _refuse_unless_ours(target / name, known.get(name.as_posix()))
    new, stale = set(files), []
    for folder in sorted({name.parent for name in files} | {Path(name).parent for name in known}):
        place = target / folder
        shards = _shards(place)
        for path in sorted(place.iterdir()) if place.is_dir() else []:
            inner = folder / path.name
            is_known = path.name in NAMES or path.name in shards or inner.as_posix() in known
            if is_known and inner not in new:
                _refuse_unless_ours(path, known.get(inner.as_posix()))
                stale.append(inner)
    return stale


def _shards(folder: Path) -> set[str]:
    """The weight files that the index in `folder` names."""
    try:
        return set(_object(folder / "model.safetensors.index.json").get("weight_map", {}).values())
    except (OSError, ValueError, AttributeError, TypeError):
        return set()


def _settle(scratch: Path, target: Path, files: list[Path], stale: list[Path]) -> None:
    """Puts the files in place. What says how to read the others comes last, and until then says that they are not
    whole: a process that is killed in between leaves a folder that is refused, and not one of two models."""
    heads = [name for name in files if name.name in HEADS]
    for name in heads:
        if (target / name).exists():
            write_json(target / name, {UNFINISHED: "Tessera was stopped while it wrote this folder; write it again"})
    for name in stale:
        (target / name).unlink(missing_ok=True)
    for name in [name for name in files if name not in heads] + sorted(heads, key=lambda head: -len(head.parts)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).replace(target / name)
    for folder in {name.parent for name in stale} - {Path(".")}:
        with suppress(OSError):
            (target / folder).rmdir()


def _make(folder: Path) -> list[Path]:
    """Makes the folder; returns what was made, the deepest first. Raises InputError where it cannot be made."""
    missing = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(missing)
        _refuse(folder, error)
    return missing


def _refuse(path: Path, error: OSError) -> None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise WriteError(f"{path} could not be written: the disk is full; make room and start again") from None
    raise InputError(f"cannot write {path}: {error.strerror or error}; choose another folder") from None


def _finish(part: Path, sync: bool = True) -> None:
    """Gives a temporary file the mode that any new file gets here, and sees that it is on the disk."""
    with tempfile.TemporaryDirectory(prefix=_part_name(), dir=part.parent) as place:
        plain = Path(place) / "plain"
        plain.touch()
        part.chmod(plain.stat().st_mode)
    if sync:
        with part.open("rb") as file:
            os.fsync(file.fileno())


def _disk_is_full(error: BaseException, place: Path) -> bool:
    """torch, safetensors and tokenizers each raise an error of their own kind for it."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | InputError):
        return False
    if isinstance(error, WriteError):  # of a file inside a folder that is being written
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    text = str(error)
    if "No space left" in text or "os error 28" in text or "os error 122" in text:
        return True
    with suppress(OSError):
        return shutil.disk_usage(place.parent).free < 65536
    return False


def _newest(scratch: Path | None) -> str | None:
    """The name of the file that was being written: the newest."""
    files = [path for path in scratch.rglob("*") if path.is_file()] if scratch is not None else []
    return max(files, key=lambda path: path.stat().st_mtime_ns).name if files else None


def _discard(scratch: Path | None) -> None:
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _part_name() -> str:
    return f"{PART}{re.sub('[^A-Za-z0-9]', '', socket.gethostname())[:40]}-{os.getpid()}-"


def _remove_abandoned(folder: Path) -> None:
    """Removes what processes of this machine that are no more left unfinished in `folder`."""
    prefix = _part_name().rsplit("-", 2)[0]
    for path in folder.glob(f"{PART}*"):
        found = re.fullmatch(re.escape(prefix) + r"-(\d+)-\w+(\.\w+)?", path.name)
        if found and not _alive(int(found[1])):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True
