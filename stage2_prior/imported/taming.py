"""The transformer of taming-transformers (Esser et al. 2021): a GPT over the codes of a condition and then of an image.

Condition and image share one vocabulary, one embedding and one row of positions: a class label is the token of that
number, a segmentation map is the codes of its own tokenizer. Nothing stands between the two; the last position of the
condition predicts the first code. It was trained without condition dropout, so it does not support guidance.
Deliberate difference from the source: positions end where an image does, so it samples images of its own size.

Letters: B batch, P condition, n positions, K codebook size, E width.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stage2_prior.base import class_labels, flatten_codes
from stage2_prior.decoder import Decoder, DecoderSpec
from stage2_prior.decoder_prior import DecoderPrior, SingleCodebookConfig
from tessera.errors import InputError
from tessera.text import TextTokenizer


class TamingConfig(SingleCodebookConfig):
    type: Literal["taming"] = "taming"
    num_classes: int | None = Field(None, ge=1)  # of a prior that draws from class labels
    segmentation_shape: tuple[int, int, int] | None = None  # Q, h, w of a map's codes, of a prior that draws from maps
    vocab_size: int = Field(1024, ge=1)  # of condition and image together
    positions: int = Field(512, ge=1)  # that it has embeddings for
    looks_ahead: int = Field(0, ge=0)  # how many of the first positions see each other, in both directions
    dim: int = Field(1024, ge=1)  # E
    depth: int = Field(24, ge=1)
    num_heads: int = Field(16, ge=1)
    mlp_dim: int = Field(4096, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> "TamingConfig":
        if (self.num_classes is None) == (self.segmentation_shape is None):
            raise ValueError("give num_classes or segmentation_shape")
        if max(self.codebook_size, self.num_classes or 0) > self.vocab_size:
            raise ValueError(
                f"vocab_size must hold the {self.codebook_size} codes and the {self.num_classes or 0} classes, got "
                f"{self.vocab_size}"
            )
        if self.prefix_length + math.prod(self.code_shape) - 1 > self.positions:
            raise ValueError(
                f"{self.positions} positions are too few for a condition of {self.prefix_length} and an image of "
                f"{math.prod(self.code_shape)}"
            )
        if self.looks_ahead > self.prefix_length:
            raise ValueError(
                f"looks_ahead must not go beyond the condition, {self.prefix_length}, got {self.looks_ahead}"
            )
        return self

    @property
    def prefix_length(self) -> int:
        return 1 if self.segmentation_shape is None else math.prod(self.segmentation_shape)

    @property
    def decoder(self) -> DecoderSpec:
        return DecoderSpec(
            dim=self.dim,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            prefix_length=self.prefix_length,
            grid=self.code_shape[1:],
            look_ahead=self.looks_ahead,
        )


class TamingPrior(DecoderPrior):
    config: TamingConfig
    supports_guidance = False

    def __init__(self, config: TamingConfig, text_tokenizer: TextTokenizer | None = None) -> None:
        super().__init__(config, text_tokenizer)
        self.condition = "class" if config.segmentation_shape is None else "segmentation"
        self.prefix_length = config.prefix_length
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.position = nn.Parameter(torch.randn(config.positions, config.dim) * 0.02)
        self.decoder = Decoder(config.decoder)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def class_prefix(self, classes: Sequence[int]) -> Tensor:
        """Labels -> (B, 1) int64."""
        assert self.config.num_classes is not None
        return class_labels(classes, self.config.num_classes, self.position.device)

    def segmentation_prefix(self, segmentation: Tensor) -> Tensor:
        """Codes of maps (B, Q, h, w) -> (B, P) int64."""
        shape, most = self.config.segmentation_shape, self.config.vocab_size
        if tuple(segmentation.shape[1:]) != shape:
            raise InputError(f"codes of segmentation maps must be (B, *{shape}), got {tuple(segmentation.shape)}")
        if segmentation.numel() and not 0 <= int(segmentation.min()) <= int(segmentation.max()) < most:
            raise InputError(f"codes of segmentation maps must be in [0, {most})")
        return flatten_codes(segmentation).to(self.position.device)

    def null_prefix(self, rows: int) -> Tensor:
        return self.unconditional(torch.empty(rows, self.prefix_length))  # says that there is none

    def embed_prefix(self, prefix: Tensor, order: Tensor | None) -> Tensor:
        return self.embedding(prefix) + self.position[: self.prefix_length]

    def embed_codes(self, codes: Tensor, first: int, order: Tensor | None, hidden: Tensor | None = None) -> Tensor:
        first += self.prefix_length
        return self.embedding(codes[..., 0]) + self.position[first : first + codes.shape[1]]

    def next_logits(self, states: Tensor, codes: Tensor) -> Tensor:
        """Tokens that are no codes of the image are left out."""
        return self.head(states)[..., : self.codebook_size]
