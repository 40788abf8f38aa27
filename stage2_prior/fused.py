"""Operations of the GPT whose gradients have formulas of their own, for training on a CPU without a compiler.

They are bound by memory there: autograd writes every intermediate result to memory of its own, which the system hands
out page by page. Fewer and reused results are faster, and less is kept for the way back. A compiler or a GPU gets
torch's own operations.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

EPS = 1e-6  # of the norms


class RMSNorm(nn.RMSNorm):
    """torch's, by `rms_norm`."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """(..., d) scaled to a root mean square of `scale` (d,), in the precision of `x`.

    On a CPU, for which torch has no fused kernel, forward and backward take a third of the time of torch's own; a
    compiler does better with the operations one by one.
    """
    if x.device.type != "cpu" or (torch.compiler.is_compiling() and x.dtype != torch.float32):
        return F.rms_norm(x, scale.shape, scale.to(x.dtype), eps=EPS)
    if torch.compiler.is_compiling():
        return x * _inverse(x) * scale
    computed = torch.promote_types(x.dtype, torch.float32)
    normed: Tensor = _RMSNorm.apply(x.to(computed), scale.to(computed))
    return normed.to(x.dtype)


def _inverse(x: Tensor) -> Tensor:
    """One over the root mean square of (..., d), (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (norm.square() / x.shape[-1] + EPS).rsqrt()


class _RMSNorm(torch.autograd.Function):
    """x r s with r = 1 / rms(x), and its gradients in few passes over memory: for gradients g of the result,
    sum(g x r) for s, and g s r - x r^3 mean(g s x) for x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        inverse = _inverse(x)
        ctx.save_for_backward(x, scale, inverse)
        return (x * inverse).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, scale, inverse = ctx.saved_tensors
        product = gradient * x
        with torch.autocast("cpu", enabled=False):  # which would round the two sums
            rows = product.reshape(-1, x.shape[-1])
            common = (rows @ scale).view_as(inverse) * inverse.pow(3) / x.shape[-1]
            of_scale = inverse.reshape(-1) @ rows
        of_x = torch.mul(gradient, scale, out=product).mul_(inverse).addcmul_(x, common, value=-1)
        return of_x, of_scale


def gelu_linear(x: Tensor, linear: nn.Module) -> Tensor:
    """linear(gelu(x)) of (..., H); what the activation gave is computed again on the way back instead of kept."""
    plain = type(linear) is nn.Linear and linear.bias is None
    if not plain or x.device.type != "cpu" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return linear(F.gelu(x))
    result: Tensor = _GELULinear.apply(x, linear.weight)
    return result


class _GELULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight.to(x.dtype))  # under autocast x comes in bfloat16

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, active = gradient.reshape(-1, gradient.shape[-1]).to(x.dtype), F.gelu(x)
        memory, of_weight = active.view(-1, x.shape[-1]), None
        with torch.autocast("cpu", enabled=False):
            if ctx.needs_input_grad[1]:  # not of a base that an adapter is trained on
                of_weight = (rows.T @ memory).to(weight.dtype)
            torch.mm(rows, weight.to(x.dtype), out=memory)  # the activation is not needed any more
        torch.ops.aten.gelu_backward.grad_input(active, x, grad_input=active)
        return active, of_weight
