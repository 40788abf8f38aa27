"""One process writes a folder at a time: a lock that the system takes back when the process ends, however it ends."""

import json
import os
import socket
import sys
import warnings
import weakref
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from tessera.errors import InputError, InputWarning

FILE = ".tessera-lock"  # in the folder; says whose it is, and stays behind when its process is killed


class FolderLock:
    """Held from `__init__` until `release`, or until the process ends, killed or not.

    The lock belongs to the process and not to the open file: loader workers, which inherit open files, do not keep it.
    """

    def __init__(self, folder: Path) -> None:
        """Raises InputError when another process has it, with the number, machine and start of that process."""
        created = not folder.exists()
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = (folder / FILE).open("a+", encoding="utf-8")
            except OSError as error:
                raise InputError(f"cannot write the folder {folder}: {error.strerror}; choose another one") from None
            if not _lock(file):
                file.seek(0)
                owner = _owner(file.read())
                file.close()
                raise InputError(f"{folder} is in use by {owner}; wait for it, end it, or choose another folder")
            if _is_at(folder / FILE, file):  # else it was released, and removed, between opening and locking
                break
            file.close()
        self.release = weakref.finalize(self, _release, folder, file, created)
        file.truncate(0)
        started = datetime.now().isoformat(" ", "seconds")
        json.dump({"process": os.getpid(), "machine": socket.gethostname(), "since": started}, file)
        file.flush()


def _release(folder: Path, file: IO[str], made: bool) -> None:
    """Removes the lock, and the folder where it was made for nothing, and lets go of it."""
    with suppress(OSError):
        (folder / FILE).unlink()
        if made:
            folder.rmdir()
    file.close()


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _lock(file: IO[str]) -> bool:
    if sys.platform == "win32":
        import msvcrt

        file.seek(0)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:  # better unlocked than no training
        warnings.warn(
            InputWarning(f"{file.name} cannot be locked ({error.strerror}): see to it that nothing else writes there"),
            stacklevel=3,
        )
    return True


def _owner(text: str) -> str:
    try:
        content = json.loads(text)
        return f"process {content['process']} on {content['machine']} since {content['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
