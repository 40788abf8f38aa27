"""Tensors that are split over the processes (DTensors): gathered to be written, split again when they are read.

Gathering is collective: every process has to call it, in the same order. A tensor that is not split is left alone.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gathered(value: Any) -> Any:
    """A state dict, or any nesting of dicts, lists and tuples, with whole tensors."""
    if isinstance(value, DTensor):
        return value.full_tensor().clone()  # without the padding of its storage
    if isinstance(value, dict):
        return {key: gathered(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(part) for part in value)
    return value


def scattered_like(value: Any, like: Tensor) -> Any:
    """A whole tensor split as `like` is, where that is split and of the same shape; anything else as it is."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


def load_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Fills a model, sharded or not, with a whole state dict; strict."""
    if is_sharded(model):
        current = model.state_dict()
        state = {
            name: scattered_like(value, current[name]) if name in current else value for name, value in state.items()
        }
    model.load_state_dict(state)


def shard(model: nn.Module, blocks: list[nn.Module]) -> None:
    """Splits the parameters over all processes (FSDP2); those of each of `blocks` are gathered while it computes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
