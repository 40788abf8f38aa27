"""The command `tessera`. Results go to standard output, logs and progress bars to standard error.

Exit codes: 0 done, 1 failed, 2 wrong input (one sentence says what was wrong and what to do), 130 interrupted,
143 ended by SIGTERM.
Nothing heavy is imported before a command runs, so `tessera --help` answers at once.
"""

from pipelines.cli import images  # noqa: F401, I001  each adds its commands, in the order in which --help lists them
from pipelines.cli import train  # noqa: F401
from pipelines.cli import evaluate  # noqa: F401
from pipelines.cli import folders  # noqa: F401
from pipelines.cli.entry import main
from pipelines.cli.failures import EXTRAS

__all__ = ["EXTRAS", "main"]
