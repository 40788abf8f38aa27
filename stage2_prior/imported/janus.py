"""Janus and Janus-Pro (Wu et al. 2024, Chen et al. 2025) as a prior: a Llama that predicts codes after its prompt.

Prompt and image are one sequence with positions in one dimension. What was trained to understand images is left out. A
prefix holds token ids of the language model, -1 on the padding to its left; what guidance steers away from is the same
prompt with the padding token in all places but the first and the last (the original's rule).

Letters: B batch, P prefix, n positions, K codebook size, E width.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from stage2_prior.base import PromptTooLong
from stage2_prior.decoder import Decoder, DecoderSpec
from stage2_prior.decoder_prior import DecoderPrior, SingleCodebookConfig
from stage2_prior.positions import RotarySpec
from tessera.errors import InputError
from tessera.text import SPECIALS, TextTokenizer

PROMPT = "{prompt}"  # stands for the user's words in a template
NOTHING = -1  # in a prefix: padding


class JanusConfig(SingleCodebookConfig):
    type: Literal["janus"] = "janus"
    template: tuple[int | str, ...]  # token ids, and pieces of text to be tokenized, one of them with {prompt}
    padding: int = Field(ge=0)  # token that stands for a prompt's in guidance
    text_length: int = Field(256, ge=2)  # P
    text_vocab_size: int = Field(102400, ge=1)
    dim: int = Field(2048, ge=1)  # E
    depth: int = Field(24, ge=1)
    num_heads: int = Field(16, ge=1)
    num_kv_heads: int = Field(16, ge=1)
    head_dim: int = Field(128, ge=2)
    mlp_dim: int = Field(5632, ge=1)
    norm_eps: float = Field(1e-6, gt=0)
    rope_theta: float = Field(10000.0, gt=0)
    code_dim: int = Field(8, ge=1)  # of a code's own embedding
    code_mlp: tuple[int, ...] = Field((2048, 2048), min_length=1)  # widths of what makes it as wide as the model
    head_mlp: int = Field(2048, ge=1)  # width of the head's hidden layer

    @model_validator(mode="after")
    def _consistent(self) -> "JanusConfig":
        if self.code_mlp[-1] != self.dim:
            raise ValueError(f"code_mlp must end with the width {self.dim}, got {self.code_mlp}")
        if sum(PROMPT in piece for piece in self.template if isinstance(piece, str)) != 1:
            raise ValueError(f"the template must have {PROMPT} in one of its pieces, got {self.template}")
        if max((piece for piece in self.template if isinstance(piece, int)), default=0) >= self.text_vocab_size:
            raise ValueError(f"the template has tokens beyond the {self.text_vocab_size} of the model: {self.template}")
        return self

    @property
    def decoder(self) -> DecoderSpec:
        return DecoderSpec(
            dim=self.dim,
            depth=self.depth,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            mlp_dim=self.mlp_dim,
            activation="swiglu",
            norm="rms",
            norm_eps=self.norm_eps,
            attention_bias=False,
            mlp_bias=False,
            prefix_length=self.text_length,
            grid=self.code_shape[1:],
            rotary=RotarySpec(base=self.rope_theta, prefix="unpadded"),
        )


class JanusPrior(DecoderPrior):
    config: JanusConfig

    def __init__(self, config: JanusConfig, text_tokenizer: TextTokenizer | None = None) -> None:
        super().__init__(config, text_tokenizer)
        self.prefix_length = config.text_length
        self.text_embedding = nn.Embedding(config.text_vocab_size, config.dim)
        self.decoder = Decoder(config.decoder)
        self.code_embedding = nn.Embedding(config.codebook_size, config.code_dim)
        widths = (config.code_dim, *config.code_mlp)
        self.code_mlp = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.head_in = nn.Linear(config.dim, config.head_mlp)
        self.head_out = nn.Linear(config.head_mlp, config.codebook_size)

    # Conditions ------------------------------------------------------------------------------------------------------

    def text_prefix(self, text: Sequence[str]) -> Tensor:
        """Texts -> (B, P) int64: the template with the text in it, padded on the left."""
        rows = [self._tokens(one) for one in text]
        for ids in rows:
            if len(ids) > self.prefix_length:
                raise PromptTooLong(
                    f"the prompt has {len(ids)} tokens with what stands around it, the prior reads at most "
                    f"{self.prefix_length}; shorten it"
                )
        return self.padded(rows)

    def pad(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Ids of the text tokenizer -> (B, P): the text that they spell in the template; the rest is cut off."""
        rows = []
        for kept in tokens:
            while len(ids := self._tokens(self._tokenizer().decode(list(kept)))) > self.prefix_length:
                if not kept:
                    raise InputError(f"the template alone has {len(ids)} tokens, the prior reads {self.prefix_length}")
                kept = kept[: self.prefix_length - len(ids)]
            rows.append(ids)
        return self.padded(rows)

    def padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Whole prompts as ids of the language model, at most P each -> (B, P) int64."""
        filled = [[NOTHING] * (self.prefix_length - len(ids)) + list(ids) for ids in rows]
        return torch.tensor(filled, device=self.code_embedding.weight.device).view(-1, self.prefix_length)

    def _tokens(self, text: str) -> list[int]:
        """The template with the text in it, as ids of the language model."""
        ids: list[int] = []
        for piece in self.config.template:
            if isinstance(piece, int):
                ids.append(piece)
            else:  # our tokenizer has its own specials before the model's ids
                ids += [i - len(SPECIALS) for i in self._tokenizer().encode(piece.replace(PROMPT, text))]
        return ids

    def _tokenizer(self) -> TextTokenizer:
        if self.text_tokenizer is None:
            raise InputError("this prior has no text tokenizer; load it with load_prior(folder, text_tokenizer)")
        return self.text_tokenizer

    def null_prefix(self, rows: int) -> Tensor:
        return self.unconditional(self.text_prefix([""])).expand(rows, -1)

    def unconditional(self, prefix: Tensor) -> Tensor:
        present = self.present(prefix)
        kept = present & (present.cumsum(1) == 1)
        kept[:, -1] = True
        return prefix.where(kept | ~present, self.config.padding)

    def present(self, prefix: Tensor) -> Tensor:
        return prefix != NOTHING

    # Embeddings and head ---------------------------------------------------------------------------------------------

    def embed_prefix(self, prefix: Tensor, order: Tensor | None) -> Tensor:
        return self.text_embedding(prefix.clamp_min(0))

    def embed_codes(self, codes: Tensor, first: int, order: Tensor | None, hidden: Tensor | None = None) -> Tensor:
        first_layer, *others = self.code_mlp
        x = first_layer(self.code_embedding(codes[..., 0]))
        for layer in others:
            x = layer(F.gelu(x))
        return x

    def next_logits(self, states: Tensor, codes: Tensor) -> Tensor:
        return self.head_out(F.gelu(self.head_in(states)))
