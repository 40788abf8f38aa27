"""The GPT prior: one causal sequence of BPE text tokens and image codes (Ramesh et al. 2021, section 2.2).

Letters: B batch, P text positions, Q codebooks, S = h·w image positions, T = S·Q codes per image, L = P + S, K codebook
size, V text vocabulary, E width. A position of the image holds its Q codes: the trunk reads the sum of their embeddings
and a head (`depth.py`) draws them one after the other.
Text starts with <start> and is filled up with <pad>, which with its position makes DALL·E's padding token of that
position. Text is predicted too, so log p(text) and log p(image | text) both exist. Deliberate differences from DALL·E:
full attention everywhere, normalised queries and keys (Henry et al. 2020), root-mean-square norms, no biases.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from common.text import PAD, START, TextTokenizer
from stage2_prior.base import Cache, Predictions, Prior, PriorConfig, prompt_tokens
from stage2_prior.depth import DepthHead

PLAIN_UP_TO = 512  # positions


class GPTConfig(PriorConfig):
    type: Literal["gpt"] = "gpt"
    text_vocab_size: int = Field(4096, ge=3)  # V
    text_length: int = Field(64, ge=2)  # P, <start> included
    dim: int = Field(512, ge=8)  # E
    depth: int = Field(12, ge=1)
    num_heads: int = Field(8, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> "GPTConfig":
        if self.dim % self.num_heads:
            raise ValueError(f"dim must be divisible by num_heads, got {self.dim} and {self.num_heads}")
        return self


class KeyValueCache(Cache):
    """Keys and values of all layers, allocated once and filled from the left, and where drawing stands."""

    def __init__(self, keys: Tensor, values: Tensor, length: int, state: Tensor, drawn: Tensor) -> None:
        self.keys, self.values = keys, values  # (depth, N, heads, L, E / heads)
        self.length = length  # positions filled so far
        self.state = state  # (N, E), the trunk's output at the last of them
        self.drawn = drawn  # (N, q), the codes that were drawn from it so far

    def repeat(self, rows: Tensor) -> "KeyValueCache":
        return KeyValueCache(self.keys[:, rows], self.values[:, rows], self.length, self.state[rows], self.drawn[rows])

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the keys and values (N, heads, S, E / heads) of new positions; returns all up to them."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class GPTPrior(Prior):
    config: GPTConfig

    def __init__(self, config: GPTConfig, text_tokenizer: TextTokenizer | None = None) -> None:
        super().__init__()
        self.config, self.text_tokenizer = config, text_tokenizer
        self.code_shape, self.length = config.code_shape, math.prod(config.code_shape)
        self.codebook_size, self.prefix_length = config.codebook_size, config.text_length
        self.num_codebooks, height, width = config.code_shape
        self.text_embedding = nn.Embedding(config.text_vocab_size, config.dim)
        self.text_position = nn.Parameter(torch.randn(config.text_length, config.dim) * 0.02)
        self.code_embedding = nn.Embedding(self.num_codebooks * config.codebook_size, config.dim)
        self.row_position = nn.Parameter(torch.randn(height, 1, config.dim) * 0.02)
        self.column_position = nn.Parameter(torch.randn(1, width, config.dim) * 0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.code_head = DepthHead(self.num_codebooks, config.codebook_size, config.dim)
        for embedding in (self.text_embedding, self.code_embedding):
            nn.init.normal_(embedding.weight, std=0.02)

    # Conditions ------------------------------------------------------------------------------------------------------

    def text_prefix(self, text: Sequence[str]) -> Tensor:
        """Texts -> (B, P) int64: <start>, the tokens, <pad> up to P. Raises InputError when a text is too long."""
        return self.pad(prompt_tokens(self.text_tokenizer, text, self.prefix_length - 1))

    def null_prefix(self, rows: int) -> Tensor:
        return self.pad([[]] * rows)

    def pad(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Token ids -> (B, P) int64 on the prior's device; what does not fit is cut off."""
        room = self.prefix_length - 1
        rows = [[START, *ids[:room], *[PAD] * (room - len(ids))] for ids in tokens]
        return torch.tensor(rows, dtype=torch.int64, device=self.text_position.device).view(-1, self.prefix_length)

    # Training --------------------------------------------------------------------------------------------------------

    def forward(self, prefix: Tensor, codes: Tensor) -> Tensor:
        return self._code_logits(self._trunk(prefix, codes), codes)

    def predict(self, prefix: Tensor, codes: Tensor) -> Predictions:
        """Teacher-forced logits of text and codes alike: prefix (B, P), codes (B, T) int64."""
        x = self._trunk(prefix, codes)
        text = x[:, : self.prefix_length - 1] @ self.text_embedding.weight.T  # tied to the input embedding
        return Predictions(text, self._code_logits(x, codes))

    def _trunk(self, prefix: Tensor, codes: Tensor) -> Tensor:
        """(B, P), (B, T) -> (B, P + S - 1, E): what each position knows about the next one."""
        before = codes[:, : -self.num_codebooks]
        x = torch.cat([self._embed_text(prefix), self._embed_codes(before, 0)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _code_logits(self, x: Tensor, codes: Tensor) -> Tensor:
        """The trunk's output (B, P + S - 1, E) and the codes (B, T) -> (B, T, K)."""
        positions = rearrange(codes, "b (s q) -> b s q", q=self.num_codebooks)
        return self.code_head(x[:, self.prefix_length - 1 :], positions).flatten(1, 2)

    # Sampling --------------------------------------------------------------------------------------------------------

    def prefill(self, prefix: Tensor, length: int) -> tuple[Tensor, KeyValueCache]:
        config = self.config
        room = prefix.shape[1] + length // self.num_codebooks
        shape = (config.depth, len(prefix), config.num_heads, room, config.dim // config.num_heads)
        empty = self.text_embedding.weight.new_zeros(shape)
        cache = KeyValueCache(empty, torch.zeros_like(empty), 0, empty[0, :, 0, 0], prefix[:, :0])
        return self._advance(self._embed_text(prefix), cache), cache

    def cache_numbers(self) -> int:
        positions = self.prefix_length + self.length // self.num_codebooks
        return 2 * self.config.depth * positions * self.config.dim

    def step(self, codes: Tensor, cache: Cache) -> Tensor:
        assert isinstance(cache, KeyValueCache)
        cache.drawn = torch.cat([cache.drawn, codes.unsqueeze(1)], dim=1)
        if cache.drawn.shape[1] < self.num_codebooks:
            return self.code_head.logits(cache.state, cache.drawn)
        return self._advance(self._embed_codes(cache.drawn, cache.length - self.prefix_length), cache)

    def _advance(self, x: Tensor, cache: KeyValueCache) -> Tensor:
        """New positions (N, new, E) -> logits of the first code after the last one (N, K)."""
        for layer, block in enumerate(self.blocks):
            x = block(x, cache, layer)
        cache.length += x.shape[1]
        cache.state, cache.drawn = self.norm(x[:, -1]), cache.drawn[:, :0]
        return self.code_head.logits(cache.state, cache.drawn)

    # Embeddings ------------------------------------------------------------------------------------------------------

    def _embed_text(self, prefix: Tensor) -> Tensor:
        return self.text_embedding(prefix) + self.text_position

    def _embed_codes(self, codes: Tensor, first: int) -> Tensor:
        """All codes (B, n·Q) of n positions from `first` on -> (B, n, E)."""
        positions = (self.row_position + self.column_position).flatten(0, 1)  # (S, E)
        table = torch.arange(self.num_codebooks, device=codes.device) * self.codebook_size  # each codebook its own rows
        own = rearrange(codes, "b (n q) -> b n q", q=self.num_codebooks) + table
        return self.code_embedding(own).sum(2) + positions[first : first + own.shape[1]]


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        hidden = int(config.dim * config.mlp_ratio)
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.mlp_in = nn.Linear(config.dim, hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.zeros_(self.mlp_out.weight)  # each block starts as the identity

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, layer: int = 0) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cache, layer))
        return x + self.dropout(self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)))))


class Attention(nn.Module):
    """Causal self-attention with unit-normalised queries and keys, each channel with a learned scale."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        head_dim = config.dim // config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.query_scale = nn.Parameter(torch.ones(head_dim))
        self.key_scale = nn.Parameter(torch.ones(head_dim))
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, cache: KeyValueCache | None, layer: int) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b h l d", three=3, h=self.num_heads).unbind()
        q, k = unit_norm(q, self.query_scale), unit_norm(k, self.key_scale)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        # With a cache either the whole prefix comes at once, or a single position that may see everything before it.
        mixed = attend(q, k, v, causal=q.shape[2] > 1)
        return self.out(rearrange(mixed, "b h l d -> b l (h d)"))


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Scaled dot-product attention, (N, heads, S, d) over (N, heads, L, d); `causal` asks for S = L.

    On a CPU torch's kernel is slower than plain products for short sequences: training at 88 positions takes 1.4 times
    as long a step with it.
    """
    if q.device.type != "cpu" or k.shape[2] > PLAIN_UP_TO:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


def unit_norm(x: Tensor, scale: Tensor) -> Tensor:
    """(..., d) scaled to a root mean square of `scale`; in the precision of `x`, where torch has a fused kernel."""
    return F.rms_norm(x, scale.shape, scale.to(x.dtype), eps=1e-6)
