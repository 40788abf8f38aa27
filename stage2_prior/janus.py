"""Janus and Janus-Pro (Wu et al. 2024, Chen et al. 2025) as a prior: a Llama that draws codes after its prompt.

The language model is transformers' own; embedding and head of the codes, the prompt and the memory of past positions
are ours. Prompt and image are one sequence with positions in one dimension. What was trained to understand pictures is
left out. A prefix holds token ids of the language model, -1 on the padding to its left; what guidance steers away from
is the same prompt with the padding token in all places but the first and the last (the original's rule).

Letters: B batch, N sequences, P prefix, S new positions, L positions so far, T codes per image, K codebook size, E
width.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from stage2_prior.base import Cache, Prior, PriorConfig, PromptTooLong
from stage2_prior.padding import PaddedKeyValues, causal_mask
from tessera.errors import InputError
from tessera.text import SPECIALS, TextTokenizer

ATTENTION = "tessera"  # name of our attention among transformers' own
PROMPT = "{prompt}"  # stands for the user's words in a template
NOTHING = -1  # in a prefix: padding


class JanusConfig(PriorConfig):
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
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}")
        if self.code_mlp[-1] != self.dim:
            raise ValueError(f"code_mlp must end with the width {self.dim}, got {self.code_mlp}")
        if self.code_shape[0] != 1:
            raise ValueError(f"this prior draws one codebook, got a code_shape of {self.code_shape}")
        if sum(PROMPT in piece for piece in self.template if isinstance(piece, str)) != 1:
            raise ValueError(f"the template must have {PROMPT} in one of its pieces, got {self.template}")
        if max((piece for piece in self.template if isinstance(piece, int)), default=0) >= self.text_vocab_size:
            raise ValueError(f"the template has tokens beyond the {self.text_vocab_size} of the model: {self.template}")
        return self


class JanusPrior(Prior):
    config: JanusConfig

    def __init__(self, config: JanusConfig, text_tokenizer: TextTokenizer | None = None) -> None:
        super().__init__()
        self.config, self.text_tokenizer = config, text_tokenizer
        self.code_shape, self.num_codebooks, self.length = config.code_shape, 1, math.prod(config.code_shape)
        self.codebook_size, self.prefix_length = config.codebook_size, config.text_length
        self.language_model = build_llama(config)
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
        seen = prefix != NOTHING
        first = seen & (seen.cumsum(1) == 1)
        first[:, -1] = True
        return prefix.where(first | ~seen, self.config.padding)

    # Training and sampling -------------------------------------------------------------------------------------------

    def forward(self, prefix: Tensor, codes: Tensor) -> Tensor:
        x = torch.cat([self._embed_text(prefix), self._embed_codes(codes[:, :-1])], dim=1)
        seen = prefix != NOTHING
        x = self._trunk(x, causal_mask(seen, x.shape[1]), _positions(seen, 0, x.shape[1]), None)
        return self._logits(x[:, self.prefix_length - 1 :])

    def prefill(self, prefix: Tensor, length: int) -> tuple[Tensor, PaddedKeyValues]:
        config, seen = self.config, prefix != NOTHING
        shape = (config.depth, len(prefix), config.num_kv_heads, self.prefix_length + length, config.head_dim)
        empty = self.code_embedding.weight.new_zeros(shape)
        cache = PaddedKeyValues(empty, torch.zeros_like(empty), seen)
        return self._advance(self._embed_text(prefix), causal_mask(seen, self.prefix_length), cache), cache

    def step(self, codes: Tensor, cache: Cache) -> Tensor:
        assert isinstance(cache, PaddedKeyValues)
        return self._advance(self._embed_codes(codes[:, None]), cache.step_mask(), cache)

    def _advance(self, x: Tensor, mask: Tensor, cache: PaddedKeyValues) -> Tensor:
        """New positions (N, S, E) -> logits of the code after the last one (N, K)."""
        x = self._trunk(x, mask, _positions(cache.seen, cache.length, x.shape[1]), cache)
        cache.length += x.shape[1]
        return self._logits(x[:, -1])

    def cache_numbers(self) -> int:
        config = self.config
        return 2 * config.depth * (self.prefix_length + self.length) * config.num_kv_heads * config.head_dim

    # Parts -----------------------------------------------------------------------------------------------------------

    def _trunk(self, x: Tensor, mask: Tensor, positions: Tensor, cache: PaddedKeyValues | None) -> Tensor:
        """(N, S, E), (N, 1, S, L), (N, S) -> (N, S, E), normalised."""
        output = self.language_model(
            inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False, key_values=cache
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _embed_text(self, prefix: Tensor) -> Tensor:
        embedded: Tensor = self.language_model.embed_tokens(prefix.clamp_min(0))
        return embedded

    def _embed_codes(self, codes: Tensor) -> Tensor:
        """(N, S) -> (N, S, E)."""
        first, *others = self.code_mlp
        x = first(self.code_embedding(codes))
        for layer in others:
            x = layer(F.gelu(x))
        return x

    def _logits(self, x: Tensor) -> Tensor:
        return self.head_out(F.gelu(self.head_in(x)))


def _positions(seen: Tensor, first: int, count: int) -> Tensor:
    """(N, P) -> (N, count) int64: where the positions from `first` on stand, padding not counted."""
    visible = F.pad(seen, (0, max(first + count - seen.shape[1], 0)), value=True)
    return (visible.cumsum(1) - 1).clamp_min(0)[:, first : first + count]


# transformers' Llama --------------------------------------------------------------------------------------------------


def build_llama(config: JanusConfig) -> Any:
    """transformers' Llama of this size; it attends as `_attend` does."""
    from transformers import AttentionInterface, LlamaConfig, LlamaModel

    AttentionInterface.register(ATTENTION, _attend)
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=config.text_vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            max_position_embeddings=config.text_length + math.prod(config.code_shape),
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attn_implementation=ATTENTION,  # type: ignore[call-arg]  # it goes to the base class
        )
    )
    llama.rotary_emb = Rotary(config.rope_theta, config.head_dim)  # type: ignore[assignment]
    return llama


class Rotary(nn.Module):
    """Cosines and sines as transformers' own, but always from float32: a model cast to bfloat16 would turn wrongly."""

    def __init__(self, theta: float, head_dim: int) -> None:
        super().__init__()
        self.theta, self.head_dim = theta, head_dim

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(N, S) -> two of (N, S, d)."""
        speeds = self.theta ** (-torch.arange(0, self.head_dim, 2, device=x.device) / self.head_dim)  # (d / 2,)
        angles = (position_ids[..., None].float() * speeds).repeat(1, 1, 2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    key_values: PaddedKeyValues | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; `key_values` is ours, and comes through its `forward`.

    (N, heads, S, d) over keys and values of all positions so far -> (N, S, heads, d).
    """
    if key_values is not None:
        key, value = key_values.extend(module.layer_idx, key, value)
    shared = query.shape[1] != key.shape[1]
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=shared
    )
    return mixed.transpose(1, 2), None
