"""Builds C++ of this repository with the machine's own compiler, once, and loads it.

A library is made for this processor and kept in the user's cache folder ($XDG_CACHE_HOME/tessera, by default
~/.cache/tessera) under a name that says of what source, compiler and processor. It needs nothing but a C++ compiler
(g++ or clang++, or what $CXX names); without one `library()` raises Unavailable and the caller does without it.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger("tessera")

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


class Unavailable(RuntimeError):
    """The library cannot be built or loaded here. The message says why, in one clause."""


def library(source: Path, what: str) -> ctypes.CDLL:
    """The library of `source`, built when this machine does not have it yet; `what` names it in messages, in the
    plural. Raises Unavailable, without trying again."""
    found = _library(source, what)
    if isinstance(found, str):
        raise Unavailable(found)
    return found


@functools.cache
def _library(source: Path, what: str) -> ctypes.CDLL | str:
    """The library, or why there is none."""
    try:
        return ctypes.CDLL(str(_built(source, what)))
    except Unavailable as error:
        return str(error)
    except OSError as error:
        return f"the compiled {what} do not load ({error})"


def _built(source: Path, what: str) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise Unavailable("there is no C++ compiler on this machine")
    key = hashlib.sha256()
    headers = [header.read_bytes() for header in sorted(source.parent.glob("*.h"))]
    for part in (source.read_bytes(), *headers, " ".join([compiler, *FLAGS, *LINK]).encode(), _processor().encode()):
        key.update(part)
    folder = cache_folder()
    library = folder / f"{source.stem}-{key.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    logger.warning("building the %s for this processor, once", what)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            built = Path(place) / library.name
            command = [*compiler.split(), *FLAGS, *LINK, "-o", str(built), str(source)]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=PATIENCE)
            if done.returncode:
                reason = next((line for line in done.stderr.splitlines() if "error" in line), "no reason given")
                raise Unavailable(f"{compiler} cannot build the {what} ({reason.strip()})")
            built.replace(library)  # whole or not at all, also when two processes build at once
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the {what} could not be built in {folder} ({error})") from None
    return library


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tessera"


def _processor() -> str:
    """What -march=native depends on: a cache folder can be shared by different machines."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return platform.machine() + line
    except OSError:
        pass
    return platform.machine() + platform.processor() + platform.node()
