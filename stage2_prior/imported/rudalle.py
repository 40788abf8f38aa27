"""ruDALL-E's GPT (Sber AI 2021; Malevich, Emojich, Surrealist XL, Kandinsky): text, then 32x32 codes, sparse attention.

Blocks are CogView's sandwich of norms (Ding et al. 2021). In a layer a position attends to all text before it, and of
the codes before it to a row, a column or a square. Two norms stand in a row after the last block. The reference's
"pb-relax" and its clamp at 65504 change rounding in half precision only and are left out.

Version 2 reads one more text position, a start token in front, but its patterns still begin at the number of positions
without it, so that its last text position counts as the first of the image: kept, because it was trained so.

Letters: B batch, P text positions, n positions, K codebook size, V text vocabulary, E width.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stage2_prior.base import prompt_tokens
from stage2_prior.decoder import Decoder, DecoderSpec
from stage2_prior.decoder_prior import DecoderPrior, SingleCodebookConfig
from stage2_prior.masks import Pattern
from tessera.text import SPECIALS, TextTokenizer

PADDING, START, END = 0, 2, 3  # of the text


class RuDALLEConfig(SingleCodebookConfig):
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
            raise ValueError(f"this prior predicts a square grid, got a code_shape of {self.code_shape}")
        if self.text_vocab_size < self.text_length + 4:
            raise ValueError(f"text_vocab_size must hold {self.text_length} paddings, got {self.text_vocab_size}")
        return self

    @property
    def decoder(self) -> DecoderSpec:
        return DecoderSpec(
            dim=self.dim,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            activation="gelu-tanh",
            attention_norm_out=True,
            mlp_norm_out=True,
            prefix_length=self.text_length + (self.version == "v2"),
            grid=self.code_shape[1:],
            patterns=arrangement(self.depth, wraps=self.version == "v2"),
            window=2 * self.reach + 1,
            pattern_prefix=self.text_length,
        )


class RuDALLEPrior(DecoderPrior):
    config: RuDALLEConfig
    supports_guidance = False

    def __init__(self, config: RuDALLEConfig, text_tokenizer: TextTokenizer | None = None) -> None:
        super().__init__(config, text_tokenizer)
        self.prefix_length = config.decoder.prefix_length
        side = config.code_shape[1]
        self.text_embedding = nn.Embedding(config.text_vocab_size, config.dim)
        self.text_position = nn.Embedding(self.prefix_length, config.dim)
        self.code_embedding = nn.Embedding(config.codebook_size, config.dim)
        self.row_position = nn.Embedding(side, config.dim)
        self.column_position = nn.Embedding(side, config.dim)
        self.decoder = Decoder(config.decoder)
        self.head_norm = nn.LayerNorm(config.dim)
        self.text_head = nn.Linear(config.dim, config.text_vocab_size)
        self.code_head = nn.Linear(config.dim, config.codebook_size)

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

    def embed_prefix(self, prefix: Tensor, order: Tensor | None) -> Tensor:
        return self.text_embedding(prefix) + self.text_position.weight

    def embed_codes(self, codes: Tensor, first: int, order: Tensor | None, hidden: Tensor | None = None) -> Tensor:
        place, side = torch.arange(first, first + codes.shape[1], device=codes.device), self.code_shape[1]
        x = self.code_embedding(codes[..., 0])
        return x + self.row_position(place // side) + self.column_position(place % side)

    def next_logits(self, states: Tensor, codes: Tensor) -> Tensor:
        return self.code_head(self.head_norm(states))

    def text_logits(self, states: Tensor) -> Tensor:
        return self.text_head(self.head_norm(states))


def arrangement(depth: int, wraps: bool) -> tuple[Pattern, ...]:
    """The pattern of each layer: every fourth a column, the last a square, the others rows."""
    square: Pattern = "wrapped-square" if wraps else "square"
    patterns: list[Pattern] = ["column" if layer % 4 == 1 else "row" for layer in range(depth)]
    if (depth - 1) % 4 != 1:
        patterns[-1] = square
    return tuple(patterns)
