"""Settings of the process and its machine."""

import subprocess
import sys

import pytest

TOUCH_AGAIN = """
import resource, sys
import torch
from tessera.hardware import keep_memory

if sys.argv[1] == "kept":
    keep_memory()
for _ in range(8):  # the first ones find out how much there is to keep
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(40 * 2**20, dtype=torch.uint8) for _ in range(5)]
    del activations
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of glibc, which is a C library for Linux")
def test_memory_that_is_kept_is_not_handed_out_page_by_page_again() -> None:
    pages = 5 * 40 * 2**20 // 4096
    asked = [
        int(subprocess.run([sys.executable, "-c", TOUCH_AGAIN, how], check=True, capture_output=True, text=True).stdout)
        for how in ("returned", "kept")
    ]
    assert asked[0] > pages / 2 and asked[1] < pages / 20, asked
