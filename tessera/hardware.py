"""What the machine has and can do: devices, free memory, arithmetic."""

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import torch

from tessera.errors import InputError


def has_accelerator() -> bool:
    """Whether there is a device beside the CPU. Unless told, accelerate takes processes on CPUs alone for one each."""
    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()


def multiplies_bfloat16() -> bool:
    """Whether the hardware has bfloat16 matrix arithmetic; a CPU without it takes a hundred times as long."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_multiplies_bfloat16()


def cpu_multiplies_bfloat16() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.6, which asks x86 processors alone
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def keep_memory() -> None:
    """Lets the process keep the memory that it frees, for a CPU that wants as much again at each training step.

    glibc gives large pieces back to the system, which then hands them out anew page by page: up to a tenth of a step.
    Where the C library is another, nothing changes.
    """
    library: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "gnu_get_libc_version"):
        trim_threshold, mmap_max = -1, -4  # of malloc.h
        library.mallopt(trim_threshold, -1)  # never
        library.mallopt(mmap_max, 0)


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
    for line in _text_of("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = _text_of("/sys/fs/cgroup/memory.max"), _text_of("/sys/fs/cgroup/memory.current")
    return min(free, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else free


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:  # not Linux, or no control groups
        return ""
