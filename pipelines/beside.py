"""Work beside the sampling of the next batch: on a GPU, sampling leaves room for decoding and scoring."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")


def runs_beside(device: torch.device) -> bool:
    """Not on a CPU, where sampling and decoding each use all cores."""
    return device.type != "cpu"


def beside(batches: Iterator[list[Part]], work: Callable[[Part], Result], device: torch.device) -> Iterator[Result]:
    """`work` of each part of each batch, in order; of one batch while the next is made, on a stream of its own."""
    if not runs_beside(device):
        for batch in batches:
            yield from map(work, batch)
        return
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def on_stream(part: Part) -> Result:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            return work(part)

    with ThreadPoolExecutor(1) as worker:
        before: list[Future[Result]] = []
        for batch in batches:
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream(device))  # the batch must be finished
            under_way = [worker.submit(on_stream, part) for part in batch]
            yield from (future.result() for future in before)
            before = under_way
        yield from (future.result() for future in before)
