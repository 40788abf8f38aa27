"""Root-mean-square norms with a hand-written gradient, for training on a CPU, where torch has no fused kernel.

Autograd keeps several intermediate results of each norm for the backward pass; this keeps the input and one number a
row, which saves a prior of twelve layers a seventh of the memory of a step.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class LeanRMSNorm(nn.RMSNorm):
    """torch's over the last axis, by `rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, scale: Tensor, eps: float | None) -> Tensor:
    """(..., d) scaled to a root mean square of `scale` (d,), in the precision of `x`."""
    training = x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not training or eps is None:
        return F.rms_norm(x, scale.shape, scale.to(x.dtype), eps=eps)
    dtype = torch.promote_types(x.dtype, torch.float32)
    normed: Tensor = _RMSNorm.apply(x.to(dtype), scale.to(dtype), eps)
    return normed.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """x r s with r = 1 / rms(x). For gradients g of the result: sum(g x r) for s, g s r - x r^3 mean(g s x) for x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = (norm.square() / x.shape[-1] + eps).rsqrt()  # (..., 1)
        ctx.save_for_backward(x, scale, inverse)
        return (x * inverse).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, inverse = ctx.saved_tensors
        slopes = gradient * x
        with torch.autocast("cpu", enabled=False):  # which would round the two sums
            rows = slopes.reshape(-1, x.shape[-1])
            common = (rows @ scale).view_as(inverse) * inverse.pow(3) / x.shape[-1]
            for_scale = inverse.reshape(-1) @ rows
        for_x = torch.mul(gradient, scale, out=slopes).mul_(inverse).addcmul_(x, common, value=-1)
        return for_x, for_scale, None
