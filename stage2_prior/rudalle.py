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

from stage2_prior import patterns
from stage2_prior.base import Predictions, prompt_tokens
from stage2_prior.blocks import Block, BlocksConfig, BlocksPrior
from tessera.text import SPECIALS, TextTokenizer

PADDING, START, END = 0, 2, 3  # of the text
Pattern = Literal["row", "column", "square"]


class RuDALLEConfig(BlocksConfig):
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
        if self.code_shape[1] != self.code_shape[2]:
            raise ValueError(f"this prior draws a square, got a code_shape of {self.code_shape}")
        if self.text_vocab_size < self.text_length + 4:
            raise ValueError(f"text_vocab_size must hold {self.text_length} paddings, got {self.text_vocab_size}")
        return self


class RuDALLEPrior(BlocksPrior):
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

    def predict(self, prefix: Tensor, codes: Tensor) -> Predictions:
        text, image = self._trunk(prefix, codes).split([self.prefix_length - 1, self.length], dim=1)
        return Predictions(self.text_head(self._normed(text)), self._code_logits(image))

    def _embed_prefix(self, prefix: Tensor) -> Tensor:
        return self.text_embedding(prefix) + self.text_position.weight

    def _embed_codes(self, codes: Tensor, first: int) -> Tensor:
        place, side = torch.arange(first, first + codes.shape[1], device=codes.device), self.code_shape[1]
        return self.code_embedding(codes) + self.row_position(place // side) + self.column_position(place % side)

    def _code_logits(self, x: Tensor) -> Tensor:
        return self.code_head(self._normed(x))

    def _normed(self, x: Tensor) -> Tensor:
        return self.head_norm(self.norm(x))

    def _mask(self, layer: int, first: int, last: int) -> Tensor:
        """Cut from what each position sees, (L, L), made once for a pattern and a device."""
        pattern, device, config = self.patterns[layer], self.text_position.weight.device, self.config
        if (pattern, device) not in self._masks:
            mask = visible(pattern, config.text_length, self.code_shape[1], config.reach, config.version == "v2")
            self._masks[pattern, device] = mask.to(device)
        return self._masks[pattern, device][first:last, :last]


def pattern_of(layer: int, depth: int) -> Pattern:
    if layer % 4 == 1:
        return "column"
    return "square" if layer == depth - 1 else "row"


def visible(pattern: Pattern, text: int, side: int, reach: int, wraps: bool) -> Tensor:
    """(L, L) bool, True where the query of a row sees the key of a column, for L = text + side².

    A "square" is `reach` rows and columns to each side; one that `wraps` goes on at the opposite edges.
    """
    places = torch.arange(text + side * side)
    if pattern != "square":
        return patterns.visible(pattern, places, places, text, (side, side), kernel=1)
    query, key = places.unsqueeze(1), places
    near = _close((query - text) // side, (key - text) // side, side, reach, wraps)
    near = near & _close((query - text) % side, (key - text) % side, side, reach, wraps)
    return (query >= key) & ((key < text) | near | (query == key))


def _close(first: Tensor, second: Tensor, side: int, reach: int, wraps: bool) -> Tensor:
    apart = (first - second).abs()
    return (torch.minimum(apart, side - apart) if wraps else apart) <= reach
