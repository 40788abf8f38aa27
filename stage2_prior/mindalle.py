"""minDALL-E's GPT (Kakao Brain 2021): 64 text positions, then 256 codes, in one causal sequence.

Text and codes have embeddings, positions and heads of their own; nothing stands between them, the last text position
foretells the first code. Padding is a token like any other and is attended to.

Letters: B batch, N sequences, P text positions, T codes per image, K codebook size, V text vocabulary, E width.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stage2_prior.base import Predictions, prompt_tokens
from stage2_prior.blocks import Block, BlocksConfig, BlocksPrior
from tessera.text import SPECIALS, TextTokenizer


class MinDALLEConfig(BlocksConfig):
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


class MinDALLEPrior(BlocksPrior):
    config: MinDALLEConfig
    knows_no_condition = False

    def __init__(self, config: MinDALLEConfig, text_tokenizer: TextTokenizer | None = None) -> None:
        super().__init__()
        self.config, self.text_tokenizer = config, text_tokenizer
        self.code_shape, self.num_codebooks, self.length = config.code_shape, 1, math.prod(config.code_shape)
        self.codebook_size, self.prefix_length = config.codebook_size, config.text_length
        self.text_embedding = nn.Embedding(config.text_vocab_size, config.dim)
        self.text_position = nn.Embedding(config.text_length, config.dim)
        self.code_embedding = nn.Embedding(config.codebook_size, config.dim)
        self.code_position = nn.Embedding(self.length, config.dim)
        self.blocks = nn.ModuleList(
            Block(
                config.dim,
                config.num_heads,
                config.mlp_dim,
                config.activation,
                attention_bias=config.attention_bias,
                mlp_bias=config.mlp_bias,
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.text_head = nn.Linear(config.dim, config.text_vocab_size, bias=False)
        self.code_head = nn.Linear(config.dim, config.codebook_size, bias=False)

    def text_prefix(self, text: Sequence[str]) -> Tensor:
        """Texts -> (B, P) int64: their tokens, padded on the right. Raises InputError when a text is too long."""
        return self.pad(prompt_tokens(self.text_tokenizer, text, self.prefix_length))

    def null_prefix(self, rows: int) -> Tensor:
        return self.pad([[]] * rows)

    def pad(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Ids of our text tokenizer, which has its specials before minDALL-E's ids -> (B, P); the rest is cut off."""
        own = [[i - len(SPECIALS) for i in ids[: self.prefix_length]] for ids in tokens]
        rows = [ids + [self.config.text_padding] * (self.prefix_length - len(ids)) for ids in own]
        return torch.tensor(rows, device=self.text_position.weight.device).view(-1, self.prefix_length)

    def predict(self, prefix: Tensor, codes: Tensor) -> Predictions:
        text, image = self._trunk(prefix, codes).split([self.prefix_length - 1, self.length], dim=1)
        return Predictions(self.text_head(self.norm(text)), self._code_logits(image))

    def _embed_prefix(self, prefix: Tensor) -> Tensor:
        return self.text_embedding(prefix) + self.text_position.weight

    def _embed_codes(self, codes: Tensor, first: int) -> Tensor:
        return self.code_embedding(codes) + self.code_position.weight[first : first + codes.shape[1]]

    def _code_logits(self, x: Tensor) -> Tensor:
        return self.code_head(self.norm(x))
