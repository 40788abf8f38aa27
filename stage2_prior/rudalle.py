"""ruDALL-E's GPT (Sber AI 2021; Malevich, Emojich, Surrealist XL, Kandinsky): text, then 32x32 codes, sparse attention.

Blocks are CogView's sandwich of norms (Ding et al. 2021). A layer lets a position see all text before it, and of the
codes before it a window, a column or a square (`pattern`). Two norms stand in a row after the last block. The
reference's "pb-relax" and its clamp at 65504 change rounding in half precision only and are left out.

Version 2 reads one more text position, a start token in front, but its patterns still begin at the number of positions
without it, so that its last text position counts as the first of the image: kept, since it was trained so.

Letters: B batch, N sequences, P text positions, T = h·w codes, L = P + T, K codebook size, V text vocabulary, E width.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from common.text import SPECIALS, TextTokenizer
from stage2_prior.base import Cache, Predictions, Prior, PriorConfig, prompt_tokens
from stage2_prior.blocks import Block, KeyValues

PADDING, START, END = 0, 2, 3  # of the text
Pattern = Literal["row", "column", "square"]


class RuDALLEConfig(PriorConfig):
    type: Literal["rudalle"] = "rudalle"
    version: Literal["v2", "v3"] = "v3"
    text_vocab_size: int = Field(16512, ge=4)  # V, with a padding token for each position at its end
    text_length: int = Field(128, ge=2)  # without v2's start token
    dim: int = Field(2048, ge=1)  # E
    depth: int = Field(24, ge=1)
    num_heads: int = Field(16, ge=1)
    mlp_dim: int = Field(8192, ge=1)
    reach: int = Field(5, ge=0)  # of the square pattern, in rows and columns around a position

    @model_validator(mode="after")
    def _consistent(self) -> "RuDALLEConfig":
        if self.dim % self.num_heads:
            raise ValueError(f"dim must be divisible by num_heads, got {self.dim} and {self.num_heads}")
        if self.code_shape[0] != 1 or self.code_shape[1] != self.code_shape[2]:
            raise ValueError(f"this prior draws a square of one codebook, got a code_shape of {self.code_shape}")
        if self.text_vocab_size < self.text_length + 4:
            raise ValueError(f"text_vocab_size must hold {self.text_length} paddings, got {self.text_vocab_size}")
        return self


class RuDALLEPrior(Prior):
    config: RuDALLEConfig
    knows_no_condition = False

    def __init__(self, config: RuDALLEConfig, text_tokenizer: TextTokenizer | None = None) -> None:
        super().__init__()
        self.config, self.text_tokenizer = config, text_tokenizer
        self.code_shape, self.num_codebooks, self.length = config.code_shape, 1, math.prod(config.code_shape)
        self.codebook_size = config.codebook_size
        self.prefix_length = config.text_length + (config.version == "v2")  # P
        side = config.code_shape[1]
        self.text_embedding = nn.Embedding(config.text_vocab_size, config.dim)
        self.text_position = nn.Embedding(self.prefix_length, config.dim)
        self.code_embedding = nn.Embedding(config.codebook_size, config.dim)
        self.row_position = nn.Embedding(side, config.dim)
        self.column_position = nn.Embedding(side, config.dim)
        self.blocks = nn.ModuleList(
            Block(config.dim, config.num_heads, config.mlp_dim, "gelu-tanh", sandwich=True) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.head_norm = nn.LayerNorm(config.dim)
        self.text_head = nn.Linear(config.dim, config.text_vocab_size)
        self.code_head = nn.Linear(config.dim, config.codebook_size)
        self.patterns = [pattern_of(layer, config.depth) for layer in range(config.depth)]
        self._masks: dict[tuple[Pattern, torch.device], Tensor] = {}

    def text_prefix(self, text: Sequence[str]) -> Tensor:
        """Texts -> (B, P) int64. Raises InputError when a text is too long."""
        return self.pad(prompt_tokens(self.text_tokenizer, text, self.config.text_length - 2))

    def null_prefix(self, rows: int) -> Tensor:
        return self.pad([[]] * rows)

    def pad(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Ids of our text tokenizer, which has its specials before ruDALL-E's -> (B, P); what does not fit is cut.

        Start, tokens, end, and the padding token of each position left; with v2's second start in front of them.
        """
        length = self.config.text_length
        first_padding = self.config.text_vocab_size - length
        rows = []
        for ids in tokens:
            row = [START, *(i - len(SPECIALS) for i in ids), END][:length]
            row += [PADDING] * (length - len(row))
            row = [first_padding + place if token == PADDING else token for place, token in enumerate(row)]
            rows.append([START] * (self.prefix_length - length) + row)
        return torch.tensor(rows, device=self.text_position.weight.device).view(-1, self.prefix_length)

    def forward(self, prefix: Tensor, codes: Tensor) -> Tensor:
        return self.code_head(self._trunk(prefix, codes)[:, self.prefix_length - 1 :])

    def predict(self, prefix: Tensor, codes: Tensor) -> Predictions:
        text, image = self._trunk(prefix, codes).split([self.prefix_length - 1, self.length], dim=1)
        return Predictions(self.text_head(text), self.code_head(image))

    def _trunk(self, prefix: Tensor, codes: Tensor) -> Tensor:
        """(B, P) and (B, T) -> (B, L - 1, E): what each position knows about the next one."""
        x = torch.cat([self._embed_text(prefix), self._embed_codes(codes[:, :-1], 0)], dim=1)
        for pattern, block in zip(self.patterns, self.blocks, strict=True):
            x = block(x, self._mask(pattern)[: x.shape[1], : x.shape[1]])
        return self.head_norm(self.norm(x))

    def prefill(self, prefix: Tensor, length: int) -> tuple[Tensor, KeyValues]:
        config = self.config
        like, width = self.text_embedding.weight, config.dim // config.num_heads
        positions = self.prefix_length + length
        cache = KeyValues.empty(like, config.depth, len(prefix), config.num_heads, positions, width)
        return self._advance(self._embed_text(prefix), cache), cache

    def step(self, codes: Tensor, cache: Cache) -> Tensor:
        assert isinstance(cache, KeyValues)
        return self._advance(self._embed_codes(codes.unsqueeze(1), cache.length - self.prefix_length), cache)

    def _advance(self, x: Tensor, cache: KeyValues) -> Tensor:
        """New positions (N, S, E) -> logits of the code after the last one (N, K)."""
        end = cache.length + x.shape[1]
        for layer, (pattern, block) in enumerate(zip(self.patterns, self.blocks, strict=True)):
            x = block(x, self._mask(pattern)[cache.length : end, :end], cache, layer)
        cache.length = end
        return self.code_head(self.head_norm(self.norm(x[:, -1])))

    def cache_numbers(self) -> int:
        return 2 * self.config.depth * (self.prefix_length + self.length) * self.config.dim

    def _embed_text(self, prefix: Tensor) -> Tensor:
        return self.text_embedding(prefix) + self.text_position.weight

    def _embed_codes(self, codes: Tensor, first: int) -> Tensor:
        """Codes (B, n) of the positions from `first` on -> (B, n, E)."""
        place, side = torch.arange(first, first + codes.shape[1], device=codes.device), self.code_shape[1]
        return self.code_embedding(codes) + self.row_position(place // side) + self.column_position(place % side)

    def _mask(self, pattern: Pattern) -> Tensor:
        """What each position sees, (L, L) bool, made once for a device."""
        device = self.text_position.weight.device
        if (pattern, device) not in self._masks:
            config = self.config
            wraps = config.version == "v2"
            mask = visible(pattern, config.text_length, self.code_shape[1], config.reach, wraps)
            self._masks[pattern, device] = mask.to(device)
        return self._masks[pattern, device]


def pattern_of(layer: int, depth: int) -> Pattern:
    if layer % 4 == 1:
        return "column"
    return "square" if layer == depth - 1 else "row"


def visible(pattern: Pattern, text: int, side: int, reach: int, wraps: bool) -> Tensor:
    """(L, L) bool, True where the query of a row sees the key of a column, for L = text + side².

    A "row" is the last side + 1 positions rather than a row of the picture. A "square" that `wraps` goes on at the
    opposite edges.
    """
    query, key = torch.meshgrid(*[torch.arange(text + side * side)] * 2, indexing="ij")
    near: Tensor
    match pattern:
        case "row":
            near = query - key <= side
        case "column":
            near = (query - key) % side == 0
        case "square":
            near = _close((query - text) // side, (key - text) // side, side, reach, wraps)
            near = near & _close((query - text) % side, (key - text) % side, side, reach, wraps)
            near = near | (query == key)
    return (query >= key) & ((key < text) | near)


def _close(first: Tensor, second: Tensor, side: int, reach: int, wraps: bool) -> Tensor:
    apart = (first - second).abs()
    return (torch.minimum(apart, side - apart) if wraps else apart) <= reach
