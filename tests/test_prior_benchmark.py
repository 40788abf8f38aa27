"""The training benchmark counts what its contenders multiply, and runs."""

from argparse import Namespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.prior_training import CONTENDERS, Size, compare

TINY = Size(dim=32, depth=2, num_heads=2, text=8, side=4, vocabulary=96, batch=2)


@pytest.mark.parametrize("name", CONTENDERS)
def test_weights_are_multiplied_as_often_as_counted(name):
    contender = CONTENDERS[name](TINY, "cpu")
    with FlopCounterMode(display=False) as counter:
        contender.loss().backward()
    counted = sum(
        number for kind, number in counter.get_flop_counts()["Global"].items() if str(kind) in ("aten.mm", "aten.addmm")
    )
    assert counted == pytest.approx(TINY.batch * TINY.tokens * 6 * contender.matrices, rel=0.06)


def test_contenders_take_turns_and_are_measured():
    arguments = Namespace(compile=False, threads=torch.get_num_threads(), rounds=1, peak_side=64, clock="processor",
                          no_memory=True)  # fmt: skip
    report = compare(["tessera", "transformers Llama"], TINY, "cpu", False, arguments)
    assert report["matmul_gflops"] > 0
    for row in report["models"].values():
        assert row["tokens_per_second"] > 0 and 0 < row["utilisation"] < 1
