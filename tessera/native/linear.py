"""Linear layers in float32 by oneDNN, for training on a CPU with AVX-512.

torch multiplies float32 matrices by MKL, which on AMD's processors does not use AVX-512; oneDNN does.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MIN_MULTIPLICATIONS = 2**26  # of a product; smaller ones gain little, and on some processors nothing


def multiplies_by_onednn() -> bool:
    """Whether float32 products are faster by oneDNN on this CPU."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.cpu.get_cpu_capability() == "AVX512"


class OneDNNLinear(nn.Linear):
    """torch's, with the products of forward and backward pass by oneDNN where they are large."""

    def forward(self, x: Tensor) -> Tensor:
        if not self._pays(x):
            return super().forward(x)
        result: Tensor = _Linear.apply(x, self.weight, self.bias)
        return result

    def _pays(self, x: Tensor) -> bool:
        training = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if not training or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return False
        float32 = x.dtype == self.weight.dtype == torch.float32
        return float32 and x.numel() * self.out_features >= MIN_MULTIPLICATIONS


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows, weight)
        return product(rows, weight, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        for_rows, for_x, for_weight, for_bias = gradient.reshape(-1, len(weight)), None, None, None
        if ctx.needs_input_grad[0]:
            for_x = product(for_rows, weight.T).view(*gradient.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:  # False for the base of an adapter
            for_weight = product(for_rows.T, rows.T)
        if ctx.needs_input_grad[2]:
            for_bias = for_rows.sum(0)
        return for_x, for_weight, for_bias


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(N, I), (O, I) and (O,) float32 -> (N, O)."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result
