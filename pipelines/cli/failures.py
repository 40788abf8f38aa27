"""What stopped a command, as one line on standard error and an exit code."""

import os
import sys
import traceback
from pathlib import Path
from typing import Any

from tessera.errors import InputError, InputWarning, WriteError, reason

EXTRAS = {  # packages that only a few need, and the extra that brings each
    "emoji": "emoji",
    "fontTools": "emoji",
    "peft": "lora",
    "sklearn": "digits",
    "tensorboard": "track",
    "torch_fidelity": "metrics",
    "torchmetrics": "metrics",
    "uharfbuzz": "emoji",
}


# Raised where a file is read, they mean that the file is damaged or cannot be had, even where the reader forgot to say
# so in its own words: by the module or the package that their class is from, and by their name.
OF_BAD_FILES = "json yaml zipfile tarfile pickle _pickle zlib struct _csv PIL safetensors_rust".split()
BAD_FILES = ("EOFError", "RecursionError", "MemoryError", "PanicException", "UnicodeDecodeError", "UnicodeEncodeError")
BAD_PATHS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning, ImportWarning)


def explain(error: BaseException) -> int:
    """One line about what stopped the command; returns the exit code."""
    if hasattr(error, "format_message"):  # typer's own: an unknown command, a missing argument, a wrong number
        return _complain("error", _usage(error), 2)
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        need = f"this needs the package {error.name}; pip install 'tessera[{EXTRAS[error.name]}]'"
        return _complain("failed", need, 1)
    shown = _show_traceback()
    if isinstance(error, InputError):
        return _complain("error", str(error), 2)
    if isinstance(error, WriteError):
        return _complain("failed", str(error), 1)
    if _is_bad_file(error):
        return _complain("error", bad_file_sentence(error), 2)
    hint = "" if shown else " (TESSERA_DEBUG=1 shows the traceback)"
    return _complain("failed", f"{type(error).__name__}: {reason(error, 1000)}{hint}", 1)


def _is_bad_file(error: BaseException) -> bool:
    package = type(error).__module__.split(".")[0]
    return isinstance(error, BAD_PATHS) or package in OF_BAD_FILES or type(error).__name__ in BAD_FILES


def bad_file_sentence(error: BaseException) -> str:
    file = getattr(error, "filename", None) or _file_at_fault(error) or "a file"
    what = getattr(error, "strerror", None) or f"{type(error).__name__}: {reason(error)}"
    return f"{file} cannot be read ({what}); give another file, or restore it"


def _file_at_fault(error: BaseException) -> Path | None:
    """The path that the innermost of our functions worked on when the error came, which knows no file itself."""
    found = None
    here = str(Path(__file__).resolve().parent.parent)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_filename
        if name.startswith(here) and "site-packages" not in name[len(here) :]:
            paths = [value for value in frame.f_locals.values() if isinstance(value, Path)]
            found = paths[-1] if paths else found
    return found


def show_warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
    """A warning as one line, without the place in the code; those of libraries to developers with TESSERA_DEBUG=1."""
    if issubclass(category, InputWarning):
        _complain("warning", str(message), 0)
    elif not issubclass(category, FOR_DEVELOPERS) or _debugging():
        _complain("warning", reason(message) if isinstance(message, Warning) else str(message), 0)


def _complain(kind: str, message: str, code: int) -> int:
    print(f"tessera: {kind}: {' '.join(message.split())}", file=sys.stderr)
    return code


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "tessera"
    return f"{error.format_message().rstrip('.')}; see '{command} --help'"


def _debugging() -> bool:
    return os.environ.get("TESSERA_DEBUG", "0") not in ("", "0")


def _show_traceback() -> bool:
    if not _debugging():
        return False
    traceback.print_exc()
    return True
