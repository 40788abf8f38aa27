"""The encoder-decoder prior of DALL·E mini (Dayma et al. 2021): BART (Lewis et al. 2019) with the norms of NormFormer.

The encoder reads the text in both directions, the decoder writes codes that attend to it. Differences from BART: each
attention has a norm behind it as well as before (Shleifer et al. 2021), the MLP is a gated one (Shazeer 2020) with a
norm inside, there are no biases but those of the norms, and embeddings are not scaled. Text is read, not foretold.

Text is <start>, the tokens, <end>, then <pad> up to P, which nothing attends to.
Letters: B batch, N sequences, P text positions, T codes per image, S new positions, K codebook size, V text vocabulary,
E width.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stage2_prior.base import Cache, Prior, PriorConfig, prompt_tokens
from stage2_prior.blocks import KeyValues
from tessera.config import Config
from tessera.errors import InputError
from tessera.text import END, PAD, START, TextTokenizer


class BartSize(Config):
    """What a recipe chooses about the model; the rest follows from the codes and the text tokenizer."""

    type: Literal["bart"] = "bart"
    text_length: int = Field(64, ge=3)  # P, <start> and <end> included; longer captions are cut off in training
    dim: int = Field(1024, ge=8)  # E
    encoder_depth: int = Field(12, ge=1)
    depth: int = Field(12, ge=1)  # of the decoder
    num_heads: int = Field(16, ge=1)
    mlp_dim: int = Field(2730, ge=1)  # two thirds of 4 E, as the gate has weights of its own
    dropout: float = Field(0.0, ge=0, lt=1)


class BartConfig(BartSize, PriorConfig):
    text_vocab_size: int = Field(4096, ge=3)  # V
    spell_emoji: bool = False  # write the names of emoji in a prompt instead of them, as DALL·E mini was trained

    @model_validator(mode="after")
    def _consistent(self) -> "BartConfig":
        if self.dim % self.num_heads:
            raise ValueError(f"dim must be divisible by num_heads, got {self.dim} and {self.num_heads}")
        if self.code_shape[0] != 1:
            raise ValueError(f"this prior draws one codebook, got a code_shape of {self.code_shape}")
        return self


class BartCache(Cache):
    """The decoder's keys and values so far, and those of the text, which every step attends to."""

    def __init__(self, own: KeyValues, text: KeyValues, seen: Tensor) -> None:
        self.own, self.text = own, text
        self.seen = seen  # (N, P) bool, True where there is text

    def repeat(self, rows: Tensor) -> "BartCache":
        return BartCache(self.own.repeat(rows), self.text.repeat(rows), self.seen[rows])


class BartPrior(Prior):
    config: BartConfig
    activation_checkpointing = False  # in training, blocks are computed again on the way back instead of remembered

    def __init__(self, config: BartConfig, text_tokenizer: TextTokenizer | None = None) -> None:
        super().__init__()
        self.config, self.text_tokenizer = config, text_tokenizer
        self.code_shape, self.num_codebooks, self.length = config.code_shape, 1, math.prod(config.code_shape)
        self.codebook_size, self.prefix_length = config.codebook_size, config.text_length
        self.text_embedding = nn.Embedding(config.text_vocab_size, config.dim)
        self.text_position = nn.Embedding(config.text_length, config.dim)
        self.text_norm = nn.LayerNorm(config.dim)
        self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_depth))
        self.encoder_norm = nn.LayerNorm(config.dim)
        self.start = nn.Parameter(torch.randn(config.dim) * 0.02)  # stands before the first code
        self.code_embedding = nn.Embedding(config.codebook_size, config.dim)
        self.code_position = nn.Embedding(self.length, config.dim)
        self.code_norm = nn.LayerNorm(config.dim)
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.codebook_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    # Conditions ------------------------------------------------------------------------------------------------------

    def text_prefix(self, text: Sequence[str]) -> Tensor:
        """Texts -> (B, P) int64. Raises InputError when a text is too long, or its tokenizer knows nothing of it."""
        if self.config.spell_emoji:
            text = [spell_emoji(one) for one in text]
        tokens = prompt_tokens(self.text_tokenizer, text, self.prefix_length - 2)
        for one, ids in zip(text, tokens, strict=True):
            if one.strip() and not ids:
                raise InputError(f"the prior's text tokenizer knows no letter of '{one[:40]}'; write it in English")
        return self.pad(tokens)

    def null_prefix(self, rows: int) -> Tensor:
        return self.pad([[]] * rows)

    def pad(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Token ids -> (B, P) int64 on the prior's device; what does not fit is cut off, and <end> with it."""
        rows = [[START, *ids, END][: self.prefix_length] for ids in tokens]
        rows = [row + [PAD] * (self.prefix_length - len(row)) for row in rows]
        return torch.tensor(rows, dtype=torch.int64, device=self.start.device).view(-1, self.prefix_length)

    # Training --------------------------------------------------------------------------------------------------------

    def forward(self, prefix: Tensor, codes: Tensor) -> Tensor:
        x, seen = self._embed(codes[:, :-1], 0), prefix != PAD
        for block, text in zip(self.decoder, self._text(prefix), strict=True):
            x = self._through(block, x, text, seen)
        return self.head(self.norm(x))

    def _text(self, prefix: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(B, P) -> what each block of the decoder attends to: keys and values, (B, heads, P, E / heads) each."""
        text, blocks = self._encode(prefix), (block for block in self.decoder if isinstance(block, DecoderBlock))
        return [block.cross.keys_values(text) for block in blocks]

    def _encode(self, prefix: Tensor) -> Tensor:
        """(B, P) -> (B, P, E)."""
        x, seen = self.text_norm(self.text_embedding(prefix) + self.text_position.weight), prefix != PAD
        for block in self.encoder:
            x = self._through(block, x, seen)
        return self.encoder_norm(x)

    def _through(self, block: nn.Module, *inputs: Any) -> Tensor:
        if self.activation_checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    # Sampling --------------------------------------------------------------------------------------------------------

    def prefill(self, prefix: Tensor, length: int) -> tuple[Tensor, BartCache]:
        config, rows = self.config, len(prefix)
        heads, width = config.num_heads, config.dim // config.num_heads
        keys, values = (torch.stack(part) for part in zip(*self._text(prefix), strict=True))
        own = KeyValues.empty(keys, config.depth, rows, heads, length + 1, width)
        cache = BartCache(own, KeyValues(keys, values), prefix != PAD)
        return self._advance(self._embed(prefix.new_zeros(rows, 0), 0), cache), cache

    def step(self, codes: Tensor, cache: Cache) -> Tensor:
        assert isinstance(cache, BartCache)
        return self._advance(self._embed(codes.unsqueeze(1), cache.own.length), cache)

    def _advance(self, x: Tensor, cache: BartCache) -> Tensor:
        """A new position (N, 1, E) -> logits of the code after it (N, K)."""
        for layer, block in enumerate(self.decoder):
            text = cache.text.keys[layer], cache.text.values[layer]
            x = block(x, text, cache.seen, cache.own, layer)
        cache.own.length += 1
        return self.head(self.norm(x[:, 0]))

    def cache_numbers(self) -> int:
        return 2 * self.config.depth * (self.prefix_length + self.length) * self.config.dim

    def _embed(self, codes: Tensor, first: int) -> Tensor:
        """What the decoder reads from position `first` on, where 0 is the start: codes (B, n) -> (B, n or n + 1, E)."""
        x = self.code_embedding(codes)
        if first == 0:
            x = torch.cat([self.start.expand(len(codes), 1, -1), x], dim=1)
        return self.code_norm(x + self.code_position.weight[first : first + x.shape[1]])


class EncoderBlock(nn.Module):
    def __init__(self, config: BartSize) -> None:
        super().__init__()
        self.attention = NormedAttention(config)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """(B, P, E), and where there is text (B, P) -> (B, P, E)."""
        h = self.attention.norm(x)
        x = x + self.attention(h, self.attention.keys_values(h), mask=seen[:, None, None])
        return x + self.mlp(x)


class DecoderBlock(nn.Module):
    def __init__(self, config: BartSize) -> None:
        super().__init__()
        self.attention = NormedAttention(config)
        self.cross = NormedAttention(config)
        self.mlp = GatedMLP(config)

    def forward(
        self,
        x: Tensor,
        text: tuple[Tensor, Tensor],
        seen: Tensor,
        cache: KeyValues | None = None,
        layer: int = 0,
    ) -> Tensor:
        """(N, S, E), the keys and values of the text, where there is any (N, P) -> (N, S, E); S is 1 with a cache."""
        h = self.attention.norm(x)
        k, v = self.attention.keys_values(h)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        x = x + self.attention(h, (k, v), causal=cache is None)
        x = x + self.cross(self.cross.norm(x), text, mask=seen[:, None, None])
        return x + self.mlp(x)


class NormedAttention(nn.Module):
    """Attention with a norm before and one behind it; the first is for the caller to apply, who needs it for keys."""

    def __init__(self, config: BartSize) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm, self.norm_out = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.q, self.k, self.v, self.out = (nn.Linear(config.dim, config.dim, bias=False) for _ in range(4))
        self.dropout = nn.Dropout(config.dropout)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, L, E) -> two of (N, heads, L, E / heads)."""
        return self._heads(self.k(x)), self._heads(self.v(x))

    def forward(
        self, x: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """(N, S, E) over L keys -> (N, S, E); `mask` is True where a key may be seen, (N, 1, 1, L)."""
        q = self._heads(self.q(x))
        mixed = F.scaled_dot_product_attention(q, *keys_values, attn_mask=mask, is_causal=causal)
        return self.dropout(self.norm_out(self.out(rearrange(mixed, "n h s d -> n s (h d)"))))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "n l (h d) -> n h l d", h=self.num_heads)


class GatedMLP(nn.Module):
    def __init__(self, config: BartSize) -> None:
        super().__init__()
        self.norm, self.inner_norm = nn.LayerNorm(config.dim), nn.LayerNorm(config.mlp_dim)
        self.gate = nn.Linear(config.dim, config.mlp_dim, bias=False)
        self.value = nn.Linear(config.dim, config.mlp_dim, bias=False)
        self.out = nn.Linear(config.mlp_dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.dropout(self.out(self.inner_norm(F.gelu(self.gate(h)) * self.value(h))))


def spell_emoji(text: str) -> str:
    """Emoji by their names, `red_heart` for the character."""
    if text.isascii():
        return text
    from emoji import demojize

    return str(demojize(text, delimiters=("", "")))
