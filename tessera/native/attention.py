"""Causal attention in bfloat16 by plain products, for training on a CPU.

torch's kernel, which keeps no weights of attention for the backward pass, takes two to six times as long there.

Letters: N sequences, S positions, d channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LENGTH = 1024  # positions; beyond, the weights that are kept take too much memory


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention, (N, heads, S, d) over (N, kv heads, L, d); without a mask causal where S > 1."""
    if mask is None and _pays(q, k):
        return causal_products(q, k, v)
    causal, shared = mask is None and q.shape[2] > 1, q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared)


def _pays(q: Tensor, k: Tensor) -> bool:
    training = q.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return training and q.dtype == torch.bfloat16 and q.shape == k.shape and 1 < q.shape[2] <= MAX_LENGTH


def causal_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of (N, heads, S, d) to itself; scores are rounded to the precision of `q`."""
    rows, length = q.shape[:2], q.shape[2]
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    later = q.new_full((length, length), -torch.inf).triu(1)
    scores = torch.baddbmm(later.expand(len(q), -1, -1), q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return (scores.softmax(-1) @ v).unflatten(0, rows)
