"""Paths that a user gives: `~` is the home folder, and what cannot be seen is told apart from what is not there."""

import os
import stat
from contextlib import suppress
from pathlib import Path

from tessera.errors import InputError


def expand(path: str | Path) -> Path:
    """The path with a leading `~` or `~name` as that user's home folder, so that no folder of that name is ever made.

    A `~name` that is there as such stays. Raises InputError where no such user is known.
    """
    path = _in_locale(Path(path))
    first = path.parts[0] if path.parts else ""
    if not first.startswith("~") or (first != "~" and os.path.lexists(first)):
        return path
    expanded = Path(os.path.expanduser(path))
    if expanded == path:
        raise InputError(f"'{path}' begins with '{first}', and the home folder of that user is not known; write it out")
    return expanded


def _in_locale(path: Path) -> Path:
    """A name that the locale has no letters for is in UTF-8 on the disk, as it would be in any other locale."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        with suppress(UnicodeEncodeError):
            return Path(os.fsdecode(str(path).encode("utf-8", "surrogateescape")))
    return path


def is_file(path: str | Path) -> bool:
    """Whether there is a file at `path`. Raises InputError when that cannot be seen, for want of permission say."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: str | Path) -> bool:
    """Whether there is a folder at `path`. Raises InputError when that cannot be seen."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: str | Path) -> int:
    """0 where there is nothing."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # a zero byte in it
        raise InputError(f"{str(path)!r} is no path: {error}") from None
