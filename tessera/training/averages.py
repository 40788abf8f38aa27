"""Exponential moving averages of weights, which are what is exported."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tessera.training.sharded import scattered_like

COUNT, PREFIX = "n_averaged", "module."  # in checkpoints, where torch's AveragedModel wrote them


class AveragedWeights:
    """The average of a model's parameters; buffers are copied. Of sharded parameters each process averages its part.

    The first update copies the weights, each later one moves the average by 1 - decay towards them.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.updates = model, decay, 0
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """To be called after each step of the model's optimizer."""
        current = self.model.state_dict()
        averaged = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        if self.updates > 0:
            torch._foreach_lerp_(
                [self.tensors[name] for name in averaged], [current[name] for name in averaged], 1 - self.decay
            )
        for name, tensor in self.tensors.items():
            if self.updates == 0 or name not in averaged:
                tensor.copy_(current[name])
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model has the average for its weights, in eval mode; afterwards all is as before."""
        weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        self._put(self.tensors)
        try:
            with evaluating(self.model):
                yield
        finally:
            self._put(weights)

    @torch.no_grad()
    def _put(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(tensors[name])

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The averages of a submodule by the names that it has for them."""
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    def state_dict(self) -> dict[str, Any]:
        return {COUNT: torch.tensor(self.updates)} | {PREFIX + name: one for name, one in self.tensors.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Also of earlier releases: the model itself knows how its weights were named then."""
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name != COUNT}
        with self.applied():
            current = self.model.state_dict()
            self.model.load_state_dict(
                {name: scattered_like(one, current[name]) if name in current else one for name, one in weights.items()}
            )
            for name, tensor in self.model.state_dict().items():
                self.tensors[name].copy_(tensor.detach())
        self.updates = int(state[COUNT])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in eval mode; afterwards each of its modules is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
