"""What this machine has: a device to draw on, and how much memory is free."""

import os
from pathlib import Path

import torch

from tessera.errors import InputError


def find_device(device: str | torch.device | None) -> torch.device:
    """`device`, or a GPU if there is one. Raises InputError when it is not there."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"the device '{device}' is not there; use 'cpu' or leave it out") from None
    return chosen


def free_memory(device: torch.device) -> int:
    """Bytes that can still be used on a GPU, or on this machine within the limits of its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    return min(free, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else free


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:  # not Linux, or no control groups
        return ""
