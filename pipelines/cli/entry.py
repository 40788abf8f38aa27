"""The entry point `main`: one command, one exit code."""

import codecs
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from pipelines.cli.app import app
from pipelines.cli.failures import explain, show_warning
from tessera.logs import shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; whatever goes wrong is one line on standard error."""
    _write_what_cannot_be_written()
    try:
        with warnings.catch_warnings(), _ended_by_sigterm(), shown():
            warnings.showwarning = show_warning  # type: ignore[assignment]
            code = app(None if arguments is None else list(arguments), prog_name="tessera", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except _Terminated:
        return 143
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BaseException as error:
        if isinstance(error, SystemExit | GeneratorExit):
            raise
        return explain(error)


class _Terminated(BaseException):
    """SIGTERM: what is being written is given up, and what was begun for it removed, on the way out."""


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM inside raises `_Terminated`, once; where a command has its own way with it, that one counts."""

    def end(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_what_cannot_be_written() -> None:
    """Characters that the terminal or the pipe has no code for are written as escapes; no work is lost for them."""

    def escape(error: UnicodeError) -> tuple[bytes, int]:
        assert isinstance(error, UnicodeEncodeError)
        # A byte of a file's name that the locale could not read is written as it is.
        coded = (
            os.fsencode(one) if "\udc80" <= one <= "\udcff" else one.encode("ascii", "backslashreplace")
            for one in error.object[error.start : error.end]
        )
        return b"".join(coded), error.end

    codecs.register_error("tessera", escape)
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape", "backslashreplace"):
            stream.reconfigure(errors="tessera")  # type: ignore[union-attr]
