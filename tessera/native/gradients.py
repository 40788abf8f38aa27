"""Operations with gradients of their own, for training on a CPU without a compiler.

Training is bound by memory there: autograd writes every intermediate result to memory of its own, which the system
hands out page by page. Fewer and reused results are faster, and less is kept for the backward pass. With a compiler or
on a GPU torch's own operations are used.

Letters: N rows, I and O widths, n sequences times heads, S positions, d channels of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.cpu.get_cpu_capability() == "AVX512"
LARGE = 2**28  # multiplications; with 4e8 oneDNN gains on MKL, with 1e7 it does not
QUERIES = 80  # that attention multiplies at a time
LONGEST_OF_PRODUCTS = 1024  # positions; torch's kernel, which keeps no scores, gains on products with the length

softmax_backward = torch.ops.aten._softmax_backward_data.out


def trains_here(x: Tensor) -> bool:
    """Whether operations on `x` are those of this module: with gradients, on a CPU, without a compiler."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class RMSNorm(nn.RMSNorm):
    """torch's, by `rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps or torch.finfo(x.dtype).eps)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """(..., d) scaled to a root mean square of `scale` (d,), in the precision of `x`.

    On a CPU, for which torch has no fused kernel, forward and backward take a third of the time of torch's own.
    """
    if not trains_here(x):
        return F.rms_norm(x, scale.shape, scale.to(x.dtype), eps=eps)
    computed = torch.promote_types(x.dtype, torch.float32)
    normed: Tensor = _RMSNorm.apply(x.to(computed), scale.to(computed), eps)
    return normed.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """x r s with r = 1 / rms(x), and its gradients in few passes over memory: for gradients g of the result,
    sum(g x r) for s, and g s r - x r^3 mean(g s x) for x."""

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
            of_scale = inverse.reshape(-1) @ rows
        of_x = torch.mul(gradient, scale, out=slopes).mul_(inverse).addcmul_(x, common, value=-1)
        return of_x, of_scale, None


class Linear(nn.Linear):
    """torch's without a bias, by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """(..., I) and weights (O, I) -> (..., O); in training in float32 on a CPU by `product`."""
    if not trains_here(x) or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
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
    """layer(gelu(x)) of (..., H); what the activation gave is computed again in the backward pass instead of kept."""
    if type(layer) is not Linear or not trains_here(x):
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


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention, (N, heads, S, d) over (N, heads, L, d); without a mask causal where S > 1.

    For causal sequences that are not long, plain products are faster in training and in bfloat16.
    """
    causal = mask is None and q.shape[2] > 1
    if causal and q.shape == k.shape and q.shape[2] <= LONGEST_OF_PRODUCTS and q.device.type == "cpu":
        if trains_here(q) or q.dtype == torch.bfloat16:
            return causal_products(q, k, v)
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared)


def causal_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of (N, heads, S, d) as plain products: a few queries at a time, over the keys that they may see.

    Scores are rounded to the precision of `q`, which torch's kernel does not do, and kept for the backward pass.
    """
    rows = q.shape[:2]
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    mixed: Tensor = _CausalProducts.apply(q, k, v) if trains_here(q) else _products(q, k, v)[0]
    return mixed.unflatten(0, rows)


def _products(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What (n, S, d) see, and with what weights, (n, queries, keys) for each of `_blocks`."""
    mixed, weights = [], []
    for first, last in _blocks(q.shape[1]):
        later = q.new_full((last - first, last), -torch.inf).triu(first + 1)
        bias = later.expand(len(q), -1, -1)
        scores = torch.baddbmm(bias, q[:, first:last], k[:, :last].transpose(1, 2), alpha=q.shape[-1] ** -0.5)
        weights.append(scores.softmax(-1))
        mixed.append(weights[-1] @ v[:, :last])
    return torch.cat(mixed, dim=1), weights


def _blocks(length: int) -> list[tuple[int, int]]:
    """The queries that are multiplied together, each from the first to before the last."""
    step = -(-length // max(1, round(length / QUERIES)))
    return [(first, min(first + step, length)) for first in range(0, length, step)]


class _CausalProducts(torch.autograd.Function):
    """Gradients of the keys and values are added up in place, where autograd fills up those of each block with zeros.

    For weights W and gradients G of the result: W' G for v, and with D the gradient W * (G v' - rows' sums of W * G v')
    of the scores, D k for q and D' q for k, both over sqrt(d).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed, weights = _products(q, k, v)
        ctx.save_for_backward(q, k, v, *weights)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *weights = ctx.saved_tensors
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (first, last), weight in zip(_blocks(q.shape[1]), weights, strict=True):
            own, scale = gradient[:, first:last], q.shape[-1] ** -0.5
            of_scores = own @ v[:, :last].transpose(1, 2)
            softmax_backward(of_scores, weight, -1, weight.dtype, grad_input=of_scores).mul_(scale)
            of_q[:, first:last] = of_scores @ k[:, :last]
            of_k[:, :last] += of_scores.transpose(1, 2) @ q[:, first:last]
            of_v[:, :last] += weight.transpose(1, 2) @ own
        return of_q, of_k, of_v
