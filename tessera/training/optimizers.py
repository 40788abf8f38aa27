"""Optimizers and the schedule of their learning rate."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from tessera.config import Config
from tessera.hardware import multiplies_bfloat16
from tessera.training.muon import Muon
from tessera.training.sharded import scattered_like


class OptimizerConfig(Config):
    """AdamW, or Muon (Jordan et al. 2024) for the matrices inside blocks with AdamW for all other parameters."""

    type: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(3e-4, gt=0)  # of AdamW; Muon's updates are scaled to AdamW's RMS and share it
    muon_learning_rate: float | None = Field(None, gt=0)  # another rate for Muon's matrices
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)  # matrices only
    warmup_steps: int = Field(100, ge=0)
    final_share: float = Field(0.05, ge=0, le=1)  # the cosine ends at this share of the learning rate
    clip_norm: float = Field(1.0, gt=0)  # gradient norm above which gradients are scaled down


class Optimizers:
    """The optimizer(s) of one model with warm-up, cosine schedule and weight decay on matrices only.

    `rates` gives parameters with a name part, such as "lora_B", another multiple of AdamW's learning rate.
    """

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, steps: int, rates: Mapping[str, float] | None = None
    ) -> None:
        self.config, self.steps = config, steps
        self.share = 1.0  # of the scheduled learning rates; a stage that finds them too high sets it
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        muon = {id(p) for p in _block_matrices(model)} if config.type == "muon" else set()
        groups: list[dict[str, Any]] = []
        for rate, named in _by_rate(model, rates or {}).items():
            decayed = [p for p in named if p.ndim >= 2 and id(p) not in muon]
            plain = [p for p in named if p.ndim < 2]
            groups.append({"params": decayed, "weight_decay": config.weight_decay, "rate": rate})
            groups.append({"params": plain, "weight_decay": 0.0, "rate": rate})
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas)
        ]
        self._rates = [config.learning_rate]
        if muon:
            matrices = [p for p in self.parameters if id(p) in muon]
            rate = config.muon_learning_rate or config.learning_rate
            self._optimizers.append(
                Muon(
                    matrices,
                    lr=rate,
                    weight_decay=config.weight_decay,
                    dtype=torch.bfloat16 if multiplies_bfloat16() else torch.float32,
                )
            )
            self._rates.append(rate)

    def step(self, step: int) -> None:
        """One update at the learning rate of `step`, then gradients are cleared."""
        factor = self.share * schedule(step, self.config.warmup_steps, self.steps, self.config.final_share)
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("rate", 1.0) * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[Any]:
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, state: list[Any]) -> None:
        for optimizer, part in zip(self._optimizers, state, strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            moments = {
                number: {name: scattered_like(value, parameters[number]) for name, value in values.items()}
                for number, values in part["state"].items()
            }
            optimizer.load_state_dict({**part, "state": moments})


def schedule(step: int, warmup_steps: int, steps: int, final_share: float) -> float:
    """Share of the learning rate at `step`: linear warm-up, then a cosine from 1 down to `final_share`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _by_rate(model: nn.Module, rates: Mapping[str, float]) -> dict[float, list[nn.Parameter]]:
    """The trained parameters for each multiple of the learning rate, those without a rate of their own first."""
    found: dict[float, list[nn.Parameter]] = {1.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = next((rate for part, rate in rates.items() if part in name.split(".")), 1.0)
            found.setdefault(rate, []).append(parameter)
    return found


def _block_matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """Weights of Linear layers inside a `blocks` list: Muon is for hidden matrices, not embeddings and heads."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "blocks" in name.split("."):
            yield module.get_parameter("weight")
