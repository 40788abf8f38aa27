"""LlamaGen's GPT (Sun et al. 2024): a Llama over codes, conditioned on a class label or on a text through T5's encoder.

A prefix is one label (B, 1), or the features of 120 text tokens, (B, P, C + 1): the last channel is 1 where there is a
token and 0 on the padding to its left. Image positions rotate queries and keys by row and column (rotary embeddings of
two dimensions, Heo et al. 2024); the published models turn those of the prefix into zeros, so that an image position
gives all of the prefix the same weight and the prefix reads itself evenly. This is a property of their training, which
the identity would break.

Letters: B batch, P prefix, n positions, K codebook size, C channels of T5's features, E width.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from stage2_prior.base import class_labels
from stage2_prior.decoder import Decoder, DecoderSpec
from stage2_prior.decoder_prior import DecoderPrior, SingleCodebookConfig
from stage2_prior.imported.t5 import T5Features
from stage2_prior.positions import RotarySpec
from tessera.text import TextTokenizer


class LlamaGenConfig(SingleCodebookConfig):
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
        return self

    @property
    def decoder(self) -> DecoderSpec:
        return DecoderSpec(
            dim=self.dim,
            depth=self.depth,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            mlp_dim=self.mlp_dim,
            activation="swiglu",
            norm="rms",
            norm_eps=self.norm_eps,
            attention_bias=False,
            mlp_bias=False,
            prefix_length=self.text_length or 1,
            grid=self.code_shape[1:],
            rotary=RotarySpec(axes=2, base=self.rope_base, pairs="interleaved", prefix="zeroed"),
        )


class LlamaGenPrior(DecoderPrior):
    config: LlamaGenConfig

    def __init__(self, config: LlamaGenConfig, text_tokenizer: TextTokenizer | None = None) -> None:
        super().__init__(config, text_tokenizer)
        self.prefix_length = config.text_length or 1
        if config.num_classes is not None:
            self.condition = "class"
            self.class_embedding = nn.Embedding(config.num_classes + 1, config.dim)  # the last one means none of them
        else:
            assert config.feature_dim is not None and config.text_encoder is not None
            self.features = T5Features(config.text_encoder, self.prefix_length, config.feature_dim)
            self.null_features = nn.Parameter(torch.randn(self.prefix_length, config.feature_dim) * 0.02)
            self.feature_in = nn.Linear(config.feature_dim, config.dim, bias=False)
            self.feature_out = nn.Linear(config.dim, config.dim, bias=False)
        self.code_embedding = nn.Embedding(config.codebook_size, config.dim)
        self.decoder = Decoder(config.decoder)
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

    def present(self, prefix: Tensor) -> Tensor | None:
        return None if prefix.ndim == 2 else prefix[:, :, -1] > 0

    # Embeddings and head ---------------------------------------------------------------------------------------------

    def embed_prefix(self, prefix: Tensor, order: Tensor | None) -> Tensor:
        if self.config.num_classes is not None:
            return self.class_embedding(prefix)
        features = prefix[:, :, :-1].to(self.feature_in.weight.dtype)
        return self.feature_out(F.gelu(self.feature_in(features), approximate="tanh"))

    def embed_codes(self, codes: Tensor, first: int, order: Tensor | None, hidden: Tensor | None = None) -> Tensor:
        return self.code_embedding(codes[..., 0])

    def next_logits(self, states: Tensor, codes: Tensor) -> Tensor:
        return self.code_head(states)
