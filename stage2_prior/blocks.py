"""What imported GPTs are made of: pre-norm blocks with biases (GPT-2, Radford et al. 2019), what they remember, and how
a prior of them goes through one sequence of its condition and the codes.

Letters: B batch, N sequences, P positions of the condition, T codes per image, S new positions, L positions so far, K
codebook size, E width.
"""

from abc import abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import model_validator
from torch import Tensor, nn

from stage2_prior.base import Cache, Prior, PriorConfig

Activation = Literal["gelu", "gelu-tanh", "gelu-sigmoid"]  # exact, and two approximations that models were trained with


class KeyValues(Cache):
    """Keys and values of all layers, allocated once and filled from the left."""

    def __init__(self, keys: Tensor, values: Tensor, length: int = 0) -> None:
        self.keys, self.values = keys, values  # (depth, N, heads, L, E / heads)
        self.length = length  # positions filled so far

    @classmethod
    def empty(cls, like: Tensor, depth: int, rows: int, heads: int, positions: int, width: int) -> "KeyValues":
        """Room for `positions`, with the precision and on the device of `like`."""
        shape = (depth, rows, heads, positions, width)
        return cls(like.new_zeros(shape), like.new_zeros(shape))

    def repeat(self, rows: Tensor) -> "KeyValues":
        return KeyValues(self.keys[:, rows], self.values[:, rows], self.length)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the keys and values (N, heads, S, E / heads) of new positions; returns all up to them."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class BlocksConfig(PriorConfig):
    """The sizes that every prior of blocks has; each gives its own."""

    dim: int  # E
    depth: int
    num_heads: int
    mlp_dim: int

    @model_validator(mode="after")
    def _divisible(self) -> "BlocksConfig":
        if self.dim % self.num_heads:
            raise ValueError(f"dim must be divisible by num_heads, got {self.dim} and {self.num_heads}")
        if self.code_shape[0] != 1:
            raise ValueError(f"this prior draws one codebook, got a code_shape of {self.code_shape}")
        return self


class BlocksPrior(Prior):
    """The condition, then the codes, in one sequence; its last position foretells the first code."""

    config: BlocksConfig
    blocks: nn.ModuleList

    @abstractmethod
    def _embed_prefix(self, prefix: Tensor) -> Tensor:
        """(N, P) -> (N, P, E)."""

    @abstractmethod
    def _embed_codes(self, codes: Tensor, first: int) -> Tensor:
        """Codes (N, n) of the image positions from `first` on -> (N, n, E)."""

    @abstractmethod
    def _code_logits(self, x: Tensor) -> Tensor:
        """What the last block gives (..., E) -> (..., K)."""

    def _mask(self, layer: int, first: int, last: int) -> Tensor | None:
        """What the positions from `first` to `last` see in a layer, (n, last) bool; None: all before and themselves."""
        return None

    def forward(self, prefix: Tensor, codes: Tensor) -> Tensor:
        return self._code_logits(self._trunk(prefix, codes)[:, self.prefix_length - 1 :])

    def prefill(self, prefix: Tensor, length: int) -> tuple[Tensor, KeyValues]:
        config, x = self.config, self._embed_prefix(prefix)
        width, positions = config.dim // config.num_heads, self.prefix_length + length
        cache = KeyValues.empty(x, config.depth, len(prefix), config.num_heads, positions, width)
        return self._advance(x, cache), cache

    def step(self, codes: Tensor, cache: Cache) -> Tensor:
        assert isinstance(cache, KeyValues)
        return self._advance(self._embed_codes(codes.unsqueeze(1), cache.length - self.prefix_length), cache)

    def cache_numbers(self) -> int:
        return 2 * self.config.depth * (self.prefix_length + self.length) * self.config.dim

    def _trunk(self, prefix: Tensor, codes: Tensor) -> Tensor:
        """(B, P) and (B, T) -> (B, P + T - 1, E), what the last block gives."""
        x = torch.cat([self._embed_prefix(prefix), self._embed_codes(codes[:, :-1], 0)], dim=1)
        for layer, block in enumerate(self.blocks):
            x = block(x, self._mask(layer, 0, x.shape[1]))
        return x

    def _advance(self, x: Tensor, cache: KeyValues) -> Tensor:
        """New positions (N, S, E) -> logits of the code after the last one (N, K)."""
        last = cache.length + x.shape[1]
        for layer, block in enumerate(self.blocks):
            x = block(x, self._mask(layer, cache.length, last), cache, layer)
        cache.length = last
        return self._code_logits(x[:, -1])


class Block(nn.Module):
    """Pre-norm attention and MLP; a `sandwich` norms what they give as well (CogView, Ding et al. 2021)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        activation: Activation,
        *,
        sandwich: bool = False,
        attention_bias: bool = True,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads, self.activation = num_heads, activation
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=attention_bias)
        self.out = nn.Linear(dim, dim, bias=attention_bias)
        self.mlp_in = nn.Linear(dim, mlp_dim, bias=mlp_bias)
        self.mlp_out = nn.Linear(mlp_dim, dim, bias=mlp_bias)
        self.attention_norm_out = nn.LayerNorm(dim) if sandwich else nn.Identity()
        self.mlp_norm_out = nn.LayerNorm(dim) if sandwich else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KeyValues | None = None, layer: int = 0) -> Tensor:
        """(N, S, E) -> (N, S, E). `mask` (S, L) is True where a position sees another; without one all before are seen.

        With a cache, either the first positions come together or a single one does.
        """
        q, k, v = rearrange(
            self.qkv(self.attention_norm(x)), "n s (three h d) -> three n h s d", three=3, h=self.num_heads
        )
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        causal = mask is None and q.shape[2] > 1
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        x = x + self.attention_norm_out(self.out(rearrange(mixed, "n h s d -> n s (h d)")))
        hidden = activate(self.mlp_in(self.mlp_norm(x)), self.activation)
        return x + self.mlp_norm_out(self.mlp_out(hidden))


def activate(x: Tensor, kind: Activation) -> Tensor:
    match kind:
        case "gelu":
            return F.gelu(x)
        case "gelu-tanh":
            return F.gelu(x, approximate="tanh")
        case "gelu-sigmoid":
            return x * (1.702 * x).sigmoid()
