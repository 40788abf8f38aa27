"""The encoder-decoder prior of DALL·E mini (Dayma et al. 2021): BART (Lewis et al. 2019) with the norms of NormFormer.

The encoder reads the text in both directions, the decoder predicts codes and attends to what was read. Differences from
BART: each attention has a norm behind it as well as before (Shleifer et al. 2021), the MLP is a gated one (Shazeer
2020) with a norm inside, there are no biases but those of the norms, and embeddings are not scaled. Text is not
predicted.

Text is <start>, the tokens, <end>, then <pad> up to P, which nothing attends to.
Letters: B batch, P text positions, n image positions, K codebook size, V text vocabulary, E width.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stage2_prior.base import prompt_tokens
from stage2_prior.decoder import Block, Decoder, DecoderSpec, View, make_norm
from stage2_prior.decoder_prior import DecoderPrior, SingleCodebookConfig
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


class BartConfig(BartSize, SingleCodebookConfig):
    text_vocab_size: int = Field(4096, ge=3)  # V
    spell_emoji: bool = False  # write the names of emoji in a prompt instead of them, as DALL·E mini was trained

    @property
    def decoder(self) -> DecoderSpec:
        """One start position stands before the codes; the text is read by cross-attention."""
        return DecoderSpec(
            dim=self.dim,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            activation="geglu",
            attention_bias=False,
            mlp_bias=False,
            attention_norm_out=True,
            mlp_hidden_norm=True,
            cross_attention=True,
            dropout=self.dropout,
            prefix_length=1,
            grid=self.code_shape[1:],
        )


class BartPrior(DecoderPrior):
    config: BartConfig

    def __init__(self, config: BartConfig, text_tokenizer: TextTokenizer | None = None) -> None:
        super().__init__(config, text_tokenizer)
        self.prefix_length = config.text_length
        self.text_embedding = nn.Embedding(config.text_vocab_size, config.dim)
        self.text_position = nn.Embedding(config.text_length, config.dim)
        self.text_norm = nn.LayerNorm(config.dim)
        self.encoder = Encoder(
            config.decoder.model_copy(update={"depth": config.encoder_depth, "cross_attention": False})
        )
        self.start = nn.Parameter(torch.randn(config.dim) * 0.02)  # stands before the first code
        self.code_embedding = nn.Embedding(config.codebook_size, config.dim)
        self.code_position = nn.Embedding(self.length, config.dim)
        self.code_norm = nn.LayerNorm(config.dim)
        self.decoder = Decoder(config.decoder)
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

    # Embeddings and head ---------------------------------------------------------------------------------------------

    def embed_prefix(self, prefix: Tensor, order: Tensor | None) -> Tensor:
        """The start alone, (B, 1, E)."""
        return self.code_norm(self.start + self.code_position.weight[:1]).expand(len(prefix), 1, -1)

    def embed_codes(self, codes: Tensor, first: int, order: Tensor | None, hidden: Tensor | None = None) -> Tensor:
        positions = self.code_position.weight[first + 1 : first + 1 + codes.shape[1]]  # the start has the first
        return self.code_norm(self.code_embedding(codes[..., 0]) + positions)

    def next_logits(self, states: Tensor, codes: Tensor) -> Tensor:
        return self.head(states)

    def memory(self, prefix: Tensor) -> dict[str, Tensor]:
        """The text as the encoder reads it, (B, P, E)."""
        x, present = self.text_norm(self.text_embedding(prefix) + self.text_position.weight), prefix != PAD
        recomputed = self.activation_checkpointing and self.training
        return {"memory": self.encoder(x, present, recomputed), "memory_present": present}

    def cache_numbers(self) -> int:
        """The text's keys and values among them."""
        return super().cache_numbers() + 2 * self.config.depth * (self.prefix_length - 1) * self.config.dim


class Encoder(nn.Module):
    """Blocks of the trunk that attend in both directions; it is no `Decoder`, which is causal."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.norm = make_norm(spec)

    def forward(self, x: Tensor, present: Tensor, recomputed: bool) -> Tensor:
        """(B, P, E), and where there is text (B, P) bool -> (B, P, E); `recomputed` keeps no activations."""
        view = View(mask=present[:, None, None])
        for block in self.blocks:
            x = checkpoint(block, x, view, use_reentrant=False) if recomputed else block(x, view)
        return self.norm(x)


def spell_emoji(text: str) -> str:
    """Emoji by their names, `red_heart` for the character."""
    if text.isascii():
        return text
    from emoji import demojize

    return str(demojize(text, delimiters=("", "")))
