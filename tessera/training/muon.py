"""Muon (Jordan et al. 2024): momentum whose every matrix is made orthogonal before the step.

torch.optim.Muon computes in bfloat16 alone, which takes a hundred times as long on CPUs that do not multiply in it, and
one matrix at a time. This one computes in the precision the hardware has, and matrices of one shape together. Updates
are scaled to the root mean square of AdamW's (Liu et al. 2025, section 2.2), so both can share a learning rate.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x -> a x + b x^3 + c x^5, steepest at 0


class Muon(torch.optim.Optimizer):
    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        iterations: int = 5,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`dtype` is that of the iterations. Every parameter must be a matrix."""
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.iterations, self.dtype = iterations, dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[matrix.shape].append(matrix)
            for shape, matrices in alike.items():
                directions = torch.stack([self._direction(matrix, group["momentum"]) for matrix in matrices])
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                for matrix, update in zip(matrices, orthogonal(directions, self.iterations, self.dtype), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _direction(self, matrix: Tensor, momentum: float) -> Tensor:
        """Nesterov momentum of the gradient."""
        state = self.state[matrix]
        if "momentum_buffer" not in state:  # torch's name, so that its checkpoints load
            state["momentum_buffer"] = torch.zeros_like(matrix)
        assert matrix.grad is not None
        state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(state["momentum_buffer"], momentum)


def orthogonal(matrices: Tensor, iterations: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Each of (N, r, c) with its singular values brought to about 1 (0.7 to 1.2), by Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)  # no singular value above 1
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
