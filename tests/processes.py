"""Several real processes over gloo, as torchrun would start them."""

import os
import socket
import subprocess
import sys


def run_processes(code: str, *arguments: object, count: int = 2, timeout: float = 240) -> list[str]:
    """Runs Python `code` on `count` processes, "{rank}" in an argument standing for the number of each; returns what
    each wrote to standard error. All must end with 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(count):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-c", code, *(str(one).replace("{rank}", str(rank)) for one in arguments)]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=timeout)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * count, said
    return said
