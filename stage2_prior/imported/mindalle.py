"""minDALL-E's GPT (Kakao Brain 2021): 64 text positions, then 256 codes, in one causal sequence.

Text and codes have embeddings, positions and heads of their own; nothing stands between them, the last text position
predicts the first code. Padding is a token like any other and is attended to.

Letters: B batch, P text positions, S image positions, n positions, K codebook size, V text vocabulary, E width.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stage2_prior.base import prompt_tokens
from stage2_prior.decoder import Decoder, DecoderSpec
from stage2_prior.decoder_prior import DecoderPrior, SingleCodebookConfig
from tessera.text import SPECIALS, TextTokenizer


class MinDALLEConfig(SingleCodebookConfig):
    type: Literal["mindalle"] = "mindalle"
    text_vocab_size: int = Field(16384, ge=1)  # V
    text_length: int = Field(64, ge=1)  # P
    text_padding: int = Field(0, ge=0)  # id of [PAD]
    dim: int = Field(1536, ge=1)  # E
    depth: int = Field(42, ge=1)
    num_heads: int = Field(24, ge=1)
    mlp_dim: int = Field(6144, ge=1)
    activation: Literal["gelu", "gelu-sigmoid"] = "gelu"
    attention_bias: bool = True
    mlp_bias: bool = True

    @property
    def decoder(self) -> DecoderSpec:
        return DecoderSpec(
            dim=self.dim,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            attention_bias=self.attention_bias,
            mlp_bias=self.mlp_bias,
            prefix_length=self.text_length,
            grid=self.code_shape[1:],
        )


class MinDALLEPrior(DecoderPrior):
    config: MinDALLEConfig
    supports_guidance = False

    def __init__(self, config: MinDALLEConfig, text_tokenizer: TextTokenizer | None = None) -> None:
        super().__init__(config, text_tokenizer)
        self.prefix_length = config.text_length
        self.text_embedding = nn.Embedding(config.text_vocab_size, config.dim)
        self.text_position = nn.Embedding(config.text_length, config.dim)
        self.code_embedding = nn.Embedding(config.codebook_size, config.dim)
        self.code_position = nn.Embedding(self.length, config.dim)
        self.decoder = Decoder(config.decoder)
        self.text_head = nn.Linear(config.dim, config.text_vocab_size, bias=False)
        self.code_head = nn.Linear(config.dim, config.codebook_size, bias=False)

    def text_prefix(self, text: Sequence[str]) -> Tensor:
        """Texts -> (B, P) int64: their tokens, padded on the right. Raises InputError when a text is too long."""
        return self.pad(prompt_tokens(self.text_tokenizer, text, self.prefix_length))

    def null_prefix(self, rows: int) -> Tensor:
        return self.pad([[]] * rows)

    def pad(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Ids of our text tokenizer, which has its specials before minDALL-E's ids -> (B, P); the rest is cut off."""
        ids = [[i - len(SPECIALS) for i in row[: self.prefix_length]] for row in tokens]
        rows = [row + [self.config.text_padding] * (self.prefix_length - len(row)) for row in ids]
        return torch.tensor(rows, device=self.text_position.weight.device).view(-1, self.prefix_length)

    def embed_prefix(self, prefix: Tensor, order: Tensor | None) -> Tensor:
        return self.text_embedding(prefix) + self.text_position.weight

    def embed_codes(self, codes: Tensor, first: int, order: Tensor | None, hidden: Tensor | None = None) -> Tensor:
        return self.code_embedding(codes[..., 0]) + self.code_position.weight[first : first + codes.shape[1]]

    def next_logits(self, states: Tensor, codes: Tensor) -> Tensor:
        return self.code_head(states)

    def text_logits(self, states: Tensor) -> Tensor:
        return self.text_head(states)
