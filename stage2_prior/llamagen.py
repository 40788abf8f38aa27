"""LlamaGen's GPT (Sun et al. 2024): a Llama over codes, drawn from a class label or from a text through T5's encoder.

A prefix is one label (B, 1), or the features of 120 text tokens, (B, P, C + 1): the last channel is 1 where there is a
token and 0 on the padding to its left. Image positions turn queries and keys by row and column (rotary embeddings of
two dimensions, Heo et al. 2024); the published models turn those of the prefix into zeros, so that an image position
gives all of the prefix the same weight and the prefix reads itself evenly. This is a property of their training, which
the identity would break.

Letters: B batch, N sequences, P prefix, S new positions, T codes per image, K codebook size, C channels of T5's
features, E width, d width of a head.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from stage2_prior.base import Cache, Condition, Prior, PriorConfig, class_labels
from stage2_prior.blocks import KeyValues
from stage2_prior.padding import PaddedKeyValues, causal_mask
from stage2_prior.t5 import T5Features
from tessera.text import TextTokenizer


class LlamaGenConfig(PriorConfig):
    type: Literal["llamagen"] = "llamagen"
    num_classes: int | None = Field(None, ge=1)  # of a prior that draws from class labels; null where it reads text
    feature_dim: int | None = Field(None, ge=1)  # C, of a prior that reads text
    text_length: int | None = Field(None, ge=1)  # P of a prior that reads text
    text_encoder: str | None = None  # folder or hub name of the T5 that it reads text with
    dim: int = Field(768, ge=4)  # E
    depth: int = Field(12, ge=1)
    num_heads: int = Field(12, ge=1)
    num_kv_heads: int = Field(12, ge=1)  # heads of keys and values; fewer are shared by several of the queries
    mlp_dim: int = Field(2048, ge=1)
    rope_base: float = Field(10000.0, gt=0)
    norm_eps: float = Field(1e-5, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> "LlamaGenConfig":
        text = (self.feature_dim, self.text_length, self.text_encoder)
        if (None in text) == (self.num_classes is None) or any(text) and self.num_classes is not None:
            raise ValueError("give num_classes, or feature_dim, text_length and text_encoder")
        if self.dim % (4 * self.num_heads) or self.num_heads % self.num_kv_heads:
            raise ValueError(
                "dim must be divisible by 4 x num_heads, and num_heads by num_kv_heads, got "
                f"{self.dim}, {self.num_heads} and {self.num_kv_heads}"
            )
        if self.code_shape[0] != 1:
            raise ValueError(f"this prior draws one codebook, got a code_shape of {self.code_shape}")
        return self


class LlamaGenPrior(Prior):
    config: LlamaGenConfig

    def __init__(self, config: LlamaGenConfig, text_tokenizer: TextTokenizer | None = None) -> None:
        super().__init__()
        self.config, self.text_tokenizer = config, text_tokenizer
        self.code_shape, self.num_codebooks, self.length = config.code_shape, 1, math.prod(config.code_shape)
        self.codebook_size, self.prefix_length = config.codebook_size, config.text_length or 1
        if config.num_classes is not None:
            self.condition: Condition = "class"
            self.class_embedding = nn.Embedding(config.num_classes + 1, config.dim)  # the last one means none of them
        else:
            assert config.feature_dim is not None and config.text_encoder is not None
            self.features = T5Features(config.text_encoder, self.prefix_length, config.feature_dim)
            self.null_features = nn.Parameter(torch.randn(self.prefix_length, config.feature_dim) * 0.02)
            self.feature_in = nn.Linear(config.feature_dim, config.dim, bias=False)
            self.feature_out = nn.Linear(config.dim, config.dim, bias=False)
        self.code_embedding = nn.Embedding(config.codebook_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.code_head = nn.Linear(config.dim, config.codebook_size, bias=False)

    # Conditions ------------------------------------------------------------------------------------------------------

    def class_prefix(self, classes: Sequence[int]) -> Tensor:
        """Labels -> (B, 1) int64."""
        assert self.config.num_classes is not None
        return class_labels(classes, self.config.num_classes, self.code_embedding.weight.device)

    def text_prefix(self, text: Sequence[str]) -> Tensor:
        """Texts -> (B, P, C + 1)."""
        return self.features(text, self.code_embedding.weight.device)

    def null_prefix(self, rows: int) -> Tensor:
        """The label after all classes; of texts the learned features of no text, none of them padding."""
        if self.config.num_classes is not None:
            return self.code_embedding.weight.new_full((rows, 1), self.config.num_classes, dtype=torch.int64)
        return F.pad(self.null_features.detach().float(), (0, 1), value=1.0).repeat(rows, 1, 1)

    def unconditional(self, prefix: Tensor) -> Tensor:
        """Of a text the features of no text, with the text's own padding: so it was trained."""
        if self.config.num_classes is not None:
            return self.null_prefix(1)
        none = self.null_features.detach().expand(len(prefix), -1, -1)
        return torch.cat([none.to(prefix.dtype), prefix[:, :, -1:]], dim=2)

    def _embed_prefix(self, prefix: Tensor) -> Tensor:
        """(B, P, ...) -> (B, P, E)."""
        if self.config.num_classes is not None:
            return self.class_embedding(prefix)
        features = prefix[:, :, :-1].to(self.feature_in.weight.dtype)
        return self.feature_out(F.gelu(self.feature_in(features), approximate="tanh"))

    def _seen(self, prefix: Tensor) -> Tensor:
        """(B, P) bool, False on padding."""
        return torch.ones_like(prefix, dtype=torch.bool) if prefix.ndim == 2 else prefix[:, :, -1] > 0

    # Training and sampling -------------------------------------------------------------------------------------------

    def forward(self, prefix: Tensor, codes: Tensor) -> Tensor:
        x = torch.cat([self._embed_prefix(prefix), self.code_embedding(codes[:, :-1])], dim=1)
        turns = torch.cat([self._prefix_turns(), self._turns(0, codes.shape[1] - 1)])
        mask = causal_mask(self._seen(prefix), x.shape[1])
        for block in self.blocks:
            x = block(x, turns, mask)
        return self.code_head(self.norm(x[:, self.prefix_length - 1 :]))

    def prefill(self, prefix: Tensor, length: int) -> tuple[Tensor, PaddedKeyValues]:
        config, seen = self.config, self._seen(prefix)
        shape = (config.depth, len(prefix), config.num_kv_heads, self.prefix_length + length)
        empty = self.code_embedding.weight.new_zeros(*shape, config.dim // config.num_heads)
        cache = PaddedKeyValues(empty, torch.zeros_like(empty), seen)
        mask = causal_mask(seen, self.prefix_length)
        return self._advance(self._embed_prefix(prefix), self._prefix_turns(), mask, cache), cache

    def step(self, codes: Tensor, cache: Cache) -> Tensor:
        assert isinstance(cache, PaddedKeyValues)
        turns = self._turns(cache.length - self.prefix_length, 1)
        return self._advance(self.code_embedding(codes)[:, None], turns, cache.step_mask(), cache)

    def _advance(self, x: Tensor, turns: Tensor, mask: Tensor, cache: PaddedKeyValues) -> Tensor:
        """New positions (N, S, E) -> logits of the code after the last one (N, K)."""
        for layer, block in enumerate(self.blocks):
            x = block(x, turns, mask, cache, layer)
        cache.length += x.shape[1]
        return self.code_head(self.norm(x[:, -1]))

    def cache_numbers(self) -> int:
        config = self.config
        width = config.dim // config.num_heads * config.num_kv_heads
        return 2 * config.depth * (self.prefix_length + self.length) * width

    # Positions -------------------------------------------------------------------------------------------------------

    def _turns(self, first: int, count: int) -> Tensor:
        """Cosines and sines of `count` image positions from `first` on, row by row: (count, d / 2, 2).

        The first half of a head's pairs of channels turns with the row, the second half with the column.
        """
        half = self.config.dim // self.config.num_heads // 2
        device = self.code_embedding.weight.device
        speeds = self.config.rope_base ** (-torch.arange(0, half, 2, device=device) / half)  # (d / 4,)
        positions = torch.arange(first, first + count, device=device)
        sides = positions // self.code_shape[2], positions % self.code_shape[2]
        angles = torch.cat([side[:, None] * speeds for side in sides], dim=1)  # (count, d / 2)
        return torch.stack([angles.cos(), angles.sin()], dim=-1)

    def _prefix_turns(self) -> Tensor:
        """(P, d / 2, 2): zeros, which turn queries and keys into zeros."""
        half = self.config.dim // self.config.num_heads // 2
        return torch.zeros(self.prefix_length, half, 2, device=self.code_embedding.weight.device)


class Block(nn.Module):
    """Llama's (Touvron et al. 2023): pre-norm attention with rotary positions, and SwiGLU."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.head_dim = config.dim // config.num_heads
        self.heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]  # of queries, keys, values
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.qkv = nn.Linear(config.dim, sum(self.heads) * self.head_dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp_gate = nn.Linear(config.dim, config.mlp_dim, bias=False)
        self.mlp_in = nn.Linear(config.dim, config.mlp_dim, bias=False)
        self.mlp_out = nn.Linear(config.mlp_dim, config.dim, bias=False)

    def forward(self, x: Tensor, turns: Tensor, mask: Tensor, cache: KeyValues | None = None, layer: int = 0) -> Tensor:
        """(N, S, E) -> (N, S, E); `turns` (S, d / 2, 2), `mask` (N, 1, S, L)."""
        heads = rearrange(self.qkv(self.attention_norm(x)), "n s (h d) -> n h s d", d=self.head_dim)
        q, k, v = heads.split(self.heads, dim=1)
        q, k = turn(q, turns), turn(k, turns)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        shared = len({*self.heads}) > 1
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared)
        x = x + self.out(rearrange(mixed, "n h s d -> n s (h d)"))
        h = self.mlp_norm(x)
        return x + self.mlp_out(F.silu(self.mlp_gate(h)) * self.mlp_in(h))


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Turns the channels 2i and 2i + 1 of (N, h, S, d) together, as a complex number, by `turns` (S, d / 2, 2)."""
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns.unbind(-1)
    turned = torch.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)
