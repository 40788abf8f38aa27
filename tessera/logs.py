"""Lines for people on standard error: the loggers of our packages, shown beside a progress bar where there is one."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PACKAGES = ("tessera", "stage1_tokenizer", "stage2_prior", "rerank", "pipelines")


class StderrHandler(logging.Handler):
    """Plain lines on what standard error is when they are written."""

    def emit(self, record: logging.LogRecord) -> None:
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(self.format(record), file=sys.stderr)
        else:
            print(self.format(record), file=sys.stderr)


def show() -> StderrHandler | None:
    """Shows the lines of our packages, as the command line and trainings do; returns the handler, None where the
    program has handlers of its own for them."""
    loggers = [logging.getLogger(name) for name in PACKAGES]
    if any(logger.handlers for logger in loggers):
        return None
    handler = StderrHandler()
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    return handler


@contextmanager
def shown() -> Iterator[None]:
    """`show` within the block."""
    handler = show()
    try:
        yield
    finally:
        for name in PACKAGES if handler is not None else ():
            logging.getLogger(name).removeHandler(handler)  # type: ignore[arg-type]
            logging.getLogger(name).setLevel(logging.NOTSET)
