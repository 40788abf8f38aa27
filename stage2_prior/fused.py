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
ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.cpu.get_cpu_capability() == "AVX512"
LARGE = 2**28  # multiplications; with 4e8 oneDNN gains on MKL, with 1e7 it does not


def has_own_gradients(x: Tensor) -> bool:
    """Whether operations on `x` are those of this module: in training, on a CPU, without a compiler."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


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
        slopes = gradient * x
        with torch.autocast("cpu", enabled=False):  # which would round the two sums
            rows = slopes.reshape(-1, x.shape[-1])
            common = (rows @ scale).view_as(inverse) * inverse.pow(3) / x.shape[-1]
            of_scale = inverse.reshape(-1) @ rows
        of_x = torch.mul(gradient, scale, out=slopes).mul_(inverse).addcmul_(x, common, value=-1)
        return of_x, of_scale


class Linear(nn.Linear):
    """torch's without a bias, by `linear`."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """(..., I) and weights (O, I) -> (..., O); in training in float32 on a CPU by `product`."""
    if not has_own_gradients(x) or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight)
    result: Tensor = _Linear.apply(x, weight)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows, weight)
        return product(rows, weight).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        of_rows, of_x, of_weight = gradient.reshape(-1, len(weight)), None, None
        if ctx.needs_input_grad[0]:
            of_x = product(of_rows, weight.T).view(*gradient.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:  # not of a base that an adapter is trained on
            of_weight = of_rows.T @ rows
        return of_x, of_weight


def product(x: Tensor, weight: Tensor) -> Tensor:
    """(N, I) and (O, I) -> (N, O).

    torch multiplies float32 by MKL; oneDNN takes a tenth less time for large matrices on a Zen 4
    (docs/performance-training.md).
    """
    large = x.device.type == "cpu" and len(x) * weight.numel() >= LARGE
    if large and ONEDNN and x.dtype == torch.float32:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return result
    return x @ weight.T


def gelu_linear(x: Tensor, layer: nn.Module) -> Tensor:
    """layer(gelu(x)) of (..., H); what the activation gave is computed again on the way back instead of kept."""
    if type(layer) is not Linear or not has_own_gradients(x):
        return layer(F.gelu(x))
    result: Tensor = _GELULinear.apply(x, layer.weight)
    return result


class _GELULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        rows = F.gelu(x).view(-1, x.shape[-1])
        return product(rows, weight.to(x.dtype)).view(*x.shape[:-1], -1)  # under autocast x comes in bfloat16

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, of_weight = gradient.reshape(-1, gradient.shape[-1]).to(x.dtype), None
        with torch.autocast("cpu", enabled=False):
            if ctx.needs_input_grad[1]:  # not of a base that an adapter is trained on
                active = F.gelu(x).view(-1, x.shape[-1])
                of_weight = product(rows.T, active.T).to(weight.dtype)
            of_x = product(rows, weight.to(x.dtype).T).view_as(x)
        torch.ops.aten.gelu_backward.grad_input(of_x, x, grad_input=of_x)
        return of_x, of_weight
