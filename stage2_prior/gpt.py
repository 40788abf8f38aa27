"""The GPT prior: one causal sequence of BPE text tokens and image codes (Ramesh et al. 2021, section 2.2).

Letters: B batch, P text positions, Q codebooks, S = h·w image positions, T = S·Q codes per image, L = P + S, K codebook
size, V text vocabulary, E width. A position of the image holds its Q codes: the trunk reads the sum of their embeddings
and a head (`depth.py`) predicts them one after another.
Text starts with <start> and is filled up with <pad>, which with its position makes DALL·E's padding token of that
position. Text is predicted too, so log p(text) and log p(image | text) both exist; other conditions (`conditions.py`:
a class, a segmentation map, none) stand in its place and are not predicted. Deliberate differences from DALL·E,
each with the config's defaults: full attention everywhere, normalised queries and keys (Henry et al. 2020),
root-mean-square norms, no biases.

Read in random order (RAR, Yu et al. 2024, section 3.2), the image positions come in any permutation, and an embedding
says which position is predicted next: such a prior can fill in the missing codes between any known ones (`infill.py`).
Codes and logits stay in raster order, whatever the order of reading.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from stage2_prior.conditions import ConditionedConfig, ConditionedPrior
from stage2_prior.decoder import Decoder, DecoderSpec
from stage2_prior.decoder_prior import DecoderPrior
from stage2_prior.depth import DepthHead
from stage2_prior.masks import TrainedPattern, arrangement
from stage2_prior.positions import RotarySpec
from tessera.config import Config
from tessera.text import PAD, TextTokenizer


class GPTSize(Config):
    """What a recipe chooses about the model; the rest follows from the codes and the condition."""

    type: Literal["gpt"] = "gpt"
    text_length: int = Field(64, ge=2)  # P, <start> included; longer captions are cut off in training
    dim: int = Field(512, ge=8)  # E
    depth: int = Field(12, ge=1)
    num_heads: int = Field(8, ge=1)
    mlp: Literal["gelu", "swiglu"] = "gelu"  # swiglu: Shazeer 2020
    mlp_ratio: float = Field(4.0, gt=0)  # hidden width for one of E; swiglu has as many parameters at 2/3 of it
    dropout: float = Field(0.0, ge=0, lt=1)
    qk_norm: bool = True
    positions: Literal["learned", "rotary", "rotary-2d"] = "learned"
    padding: Literal["tokens", "masked"] = "tokens"  # of the text: read as tokens, as DALL·E does, or never seen
    # The pattern of each layer, over and over; or DALL·E's own arrangement of them.
    attention: Literal["dalle"] | Annotated[tuple[TrainedPattern, ...], Field(min_length=1)] = ("full",)
    convolution_kernel: int = Field(11, ge=1)  # positions a side, of convolutional attention; odd. DALL·E: 11
    order: Literal["raster", "random"] = "raster"  # in which image positions are read

    @model_validator(mode="after")
    def _consistent(self) -> "GPTSize":
        if self.dim % self.num_heads:
            raise ValueError(f"dim must be divisible by num_heads, got {self.dim} and {self.num_heads}")
        channels, multiple = self.dim // self.num_heads, {"learned": 1, "rotary": 2, "rotary-2d": 4}[self.positions]
        if channels % multiple:
            raise ValueError(
                f"{self.positions} positions need a multiple of {multiple} channels a head, got {channels}"
            )
        if self.convolution_kernel % 2 == 0:
            raise ValueError(f"convolution_kernel must be odd, got {self.convolution_kernel}")
        if self.order == "random" and set(self.attention) != {"full"}:
            raise ValueError("a random order needs full attention in all layers; the patterns are in raster order")
        return self


class GPTConfig(ConditionedConfig, GPTSize):
    type: Literal["gpt"] = "gpt"

    @property
    def decoder(self) -> DecoderSpec:
        rotary = None
        if self.positions != "learned":
            rotary = RotarySpec(axes=1 if self.positions == "rotary" else 2)
        return DecoderSpec(
            dim=self.dim,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=int(self.dim * self.mlp_ratio),
            activation=self.mlp,
            norm="rms",
            norm_eps=1e-6,
            attention_bias=False,
            mlp_bias=False,
            qk_norm=self.qk_norm,
            dropout=self.dropout,
            prefix_length=self.prefix_length,
            grid=self.code_shape[1:],
            rotary=rotary,
            patterns=arrangement(self.attention, self.depth),
            window=self.convolution_kernel,
        )


class GPTPrior(ConditionedPrior, DecoderPrior):
    config: GPTConfig

    def __init__(self, config: GPTConfig, text_tokenizer: TextTokenizer | None = None) -> None:
        super().__init__(config, text_tokenizer)
        _, height, width = config.code_shape
        self.text_embedding = nn.Embedding(config.prefix_vocab_size, config.dim)  # or of what stands in its place
        if config.positions == "learned":
            self.text_position = nn.Parameter(torch.randn(self.prefix_length, config.dim) * 0.02)
        self.code_embedding = nn.Embedding(self.num_codebooks * config.codebook_size, config.dim)
        if config.positions == "learned":
            self.row_position = nn.Parameter(torch.randn(height, 1, config.dim) * 0.02)
            self.column_position = nn.Parameter(torch.randn(1, width, config.dim) * 0.02)
        if config.order == "random":
            self.row_target = nn.Parameter(torch.randn(height, 1, config.dim) * 0.02)
            self.column_target = nn.Parameter(torch.randn(1, width, config.dim) * 0.02)
        self.decoder = Decoder(config.decoder)
        self.code_head = DepthHead(self.num_codebooks, config.codebook_size, config.dim)
        for name, weight in self.decoder.named_parameters():
            if name.endswith(("attention.out.weight", "mlp_out.weight")):
                nn.init.zeros_(weight)  # each block starts as the identity
        for embedding in (self.text_embedding, self.code_embedding):
            nn.init.normal_(embedding.weight, std=0.02)

    # Embeddings ------------------------------------------------------------------------------------------------------

    def embed_prefix(self, prefix: Tensor, order: Tensor | None) -> Tensor:
        """Text (B, P) -> (B, P, E)."""
        text = self.text_embedding(prefix)
        if self.config.positions == "learned":
            text = text + self.text_position
        if order is not None:  # the last position of the text predicts the first code
            text = torch.cat([text[:, :-1], text[:, -1:] + self._targets(order[:, :1])], dim=1)
        return text

    def embed_codes(self, codes: Tensor, first: int, order: Tensor | None, hidden: Tensor | None = None) -> Tensor:
        table = torch.arange(self.num_codebooks, device=codes.device) * self.codebook_size  # rows of each codebook
        x, last = self.code_embedding(codes + table).sum(2), first + codes.shape[1]
        if hidden is not None:
            x = x.masked_fill(hidden.unsqueeze(2), 0.0)
        if self.config.positions == "learned":
            positions = (self.row_position + self.column_position).flatten(0, 1)  # (S, E)
            x = x + (positions[first:last] if order is None else positions[order[:, first:last]])
        return x if order is None else x + self._targets(order[:, first + 1 : last + 1])

    def _targets(self, order: Tensor) -> Tensor:
        """The image positions (B, n) that are predicted next -> (B, n, E)."""
        return (self.row_target + self.column_target).flatten(0, 1)[order]

    # Heads -----------------------------------------------------------------------------------------------------------

    def next_logits(self, states: Tensor, codes: Tensor) -> Tensor:
        return self.code_head.logits(states, codes)

    def code_logits(self, states: Tensor, codes: Tensor) -> Tensor:
        return self.code_head(states, codes).flatten(1, 2)

    def text_logits(self, states: Tensor) -> Tensor | None:
        """Tied to the input embedding."""
        return F.linear(states, self.text_embedding.weight) if self.condition == "text" else None

    # Padding and order -----------------------------------------------------------------------------------------------

    def present(self, prefix: Tensor) -> Tensor | None:
        return prefix != PAD if self.config.padding == "masked" and self.condition == "text" else None

    def reading_order(self, rows: int, order: Tensor | None) -> Tensor | None:
        if self.config.order == "raster":
            assert order is None
            return None
        if order is None:
            positions = torch.arange(self.length // self.num_codebooks, device=self.row_target.device)
            order = positions.expand(rows, -1)
        return order
