"""The GPT's self-attention, and what it remembers of the positions before.

Letters: N sequences, S new positions, L positions so far, E width, d channels of a head.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stage2_prior.base import Cache
from stage2_prior.fused import Linear, has_own_gradients, rms_norm
from stage2_prior.positions import Rotation, rotate

# On a CPU (docs/performance-training.md): queries that are multiplied at a time, and the longest sequence that is
# multiplied so. Torch's kernel, which keeps no scores, gains on it with the length.
QUERIES = 80
LONGEST_OF_PRODUCTS = 1024

softmax_backward = torch.ops.aten._softmax_backward_data.out


class View(NamedTuple):
    """How new positions look at the sequence."""

    mask: Tensor | None  # (S, L) or (N, 1, S, L) bool, True where a position sees another; None: all before and itself
    rotation: Rotation | None  # of the new positions; None when positions are in the embeddings


class KeyValueCache(Cache):
    """Keys and values of all layers, allocated once and filled from the left, and where drawing stands."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        length: int,
        state: Tensor,
        drawn: Tensor,
        said: Tensor | None = None,
        order: Tensor | None = None,
    ) -> None:
        self.keys, self.values = keys, values  # (depth, N, heads, L, d)
        self.length = length  # positions filled so far
        self.state = state  # (N, E), the trunk's output at the last of them
        self.drawn = drawn  # (N, q), the codes that were drawn from it so far
        self.said = said  # (N, P) bool, text positions that can be seen; None: all
        self.order = order  # (N, h·w), in which image positions are read; None: row after row

    def repeat(self, rows: Tensor) -> "KeyValueCache":
        said = None if self.said is None else self.said[rows]
        order = None if self.order is None else self.order[rows]
        keys, values = self.keys[:, rows], self.values[:, rows]
        return KeyValueCache(keys, values, self.length, self.state[rows], self.drawn[rows], said, order)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the keys and values (N, heads, S, d) of new positions; returns all up to them."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal self-attention; with `qk_norm`, queries and keys have unit norm and each channel a learned scale."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads, self.qk_norm = num_heads, qk_norm
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim)
        if qk_norm:
            self.query_scale = nn.Parameter(torch.ones(dim // num_heads))
            self.key_scale = nn.Parameter(torch.ones(dim // num_heads))
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, view: View, cache: KeyValueCache | None, layer: int) -> Tensor:
        """(N, S, E) -> (N, S, E). With a cache, either the first positions come together or a single one does."""
        # Parted before the heads move forward, so that the way back joins the gradients of all three in one copy.
        parts = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (rearrange(part, "b l (h d) -> b h l d", h=self.num_heads) for part in parts)
        if self.qk_norm:
            q, k = rms_norm(q, self.query_scale), rms_norm(k, self.key_scale)
        if view.rotation is not None:
            q, k = rotate(q, view.rotation), rotate(k, view.rotation)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        return self.out(rearrange(attend(q, k, v, view.mask), "b h l d -> b l (h d)"))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention, (N, heads, S, d) over (N, heads, L, d); without a mask S is L and causal, or 1.

    On a CPU plain products are faster for a single position (32 rows of 88 positions take two thirds of the time), and
    for causal sequences that are not long in training and in bfloat16.
    """
    if q.device.type != "cpu":
        return _fused(q, k, v, mask)
    if q.shape[2] == 1:
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1).to(v.dtype) @ v
    if mask is None and q.shape[2] <= LONGEST_OF_PRODUCTS and (has_own_gradients(q) or q.dtype == torch.bfloat16):
        return causal_products(q, k, v)
    return _fused(q, k, v, mask)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)


def causal_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of (N, heads, S, d) as plain products: a few queries at a time, over the keys that they may see.

    Scores are rounded to the precision of `q`, which torch's kernel does not do, and kept for the way back.
    """
    rows = q.shape[:2]
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    mixed: Tensor = _CausalProducts.apply(q, k, v) if has_own_gradients(q) else _products(q, k, v)[0]
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
