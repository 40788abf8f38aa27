"""The GPT prior: one causal sequence of BPE text tokens and image codes (Ramesh et al. 2021, section 2.2).

Letters: B batch, P text positions, Q codebooks, S = h·w image positions, T = S·Q codes per image, L = P + S, K codebook
size, V text vocabulary, E width. A position of the image holds its Q codes: the trunk reads the sum of their embeddings
and a head (`depth.py`) draws them one after the other.
Text starts with <start> and is filled up with <pad>, which with its position makes DALL·E's padding token of that
position. Text is predicted too, so log p(text) and log p(image | text) both exist; other conditions (`conditions.py`:
a class, a segmentation map, none) stand in its place and are not predicted. Deliberate differences from DALL·E,
each with the config's defaults: full attention everywhere, normalised queries and keys (Henry et al. 2020),
root-mean-square norms, no biases.

Read in random order (RAR, Yu et al. 2024, section 3.2), the image positions come in any permutation, and each tells by
an embedding which position it is to foretell: such a prior can fill what is missing between any given codes
(`infill.py`). Codes and logits stay in the places of the grid, whatever the order.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stage2_prior.attention import Attention, KeyValueCache, View
from stage2_prior.base import Cache, Predictions
from stage2_prior.conditions import ConditionedConfig, ConditionedPrior
from stage2_prior.depth import DepthHead
from stage2_prior.fused import Linear, RMSNorm, gelu_linear, linear
from stage2_prior.patterns import Pattern, arrangement, visible
from stage2_prior.positions import Axes, rotation
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
    attention: Literal["dalle"] | Annotated[tuple[Pattern, ...], Field(min_length=1)] = ("full",)
    convolution_kernel: int = Field(11, ge=1)  # positions a side, of convolutional attention; odd. DALL·E: 11
    order: Literal["raster", "random"] = "raster"  # in which image positions are read

    @model_validator(mode="after")
    def _consistent(self) -> "GPTSize":
        if self.dim % self.num_heads:
            raise ValueError(f"dim must be divisible by num_heads, got {self.dim} and {self.num_heads}")
        channels, turned = self.dim // self.num_heads, {"learned": 1, "rotary": 2, "rotary-2d": 4}[self.positions]
        if channels % turned:
            raise ValueError(f"{self.positions} positions need a multiple of {turned} channels a head, got {channels}")
        if self.convolution_kernel % 2 == 0:
            raise ValueError(f"convolution_kernel must be odd, got {self.convolution_kernel}")
        if self.order == "random" and set(self.attention) != {"full"}:
            raise ValueError("a random order needs full attention in all layers, since the patterns go row after row")
        return self


class GPTConfig(ConditionedConfig, GPTSize):
    type: Literal["gpt"] = "gpt"


class GPTPrior(ConditionedPrior):
    config: GPTConfig
    activation_checkpointing = False  # in training, blocks are computed again on the way back instead of remembered

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
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.patterns = arrangement(config.attention, config.depth)
        self.norm = RMSNorm(config.dim)
        self.code_head = DepthHead(self.num_codebooks, config.codebook_size, config.dim)
        for embedding in (self.text_embedding, self.code_embedding):
            nn.init.normal_(embedding.weight, std=0.02)

    # Training --------------------------------------------------------------------------------------------------------

    def forward(self, prefix: Tensor, codes: Tensor, order: Tensor | None = None) -> Tensor:
        """As the contract says; read in `order` (B, S), a permutation of the image positions for each row, logits
        depend on the codes of positions before theirs in that order."""
        return self._code_logits(self._trunk(prefix, codes, order), codes, order)

    def predict(
        self, prefix: Tensor, codes: Tensor, order: Tensor | None = None, hidden: Tensor | None = None
    ) -> Predictions:
        """Teacher-forced logits of text and codes alike: prefix (B, P), codes (B, T) int64. Of image positions that are
        `hidden` (B, S) bool, later ones learn nothing; a residual code still reads those that it refines."""
        x, text = self._trunk(prefix, codes, order, hidden), None
        if self.condition == "text":
            text = linear(x[:, : self.prefix_length - 1], self.text_embedding.weight)  # tied to the input embedding
        return Predictions(text, self._code_logits(x, codes, order))

    def _trunk(self, prefix: Tensor, codes: Tensor, order: Tensor | None, hidden: Tensor | None = None) -> Tensor:
        """(B, P), (B, T) -> (B, P + S - 1, E): what each position knows about the next one."""
        order = self._order(len(prefix), order)
        if hidden is not None:
            hidden = (hidden if order is None else hidden.take_along_dim(order, 1))[:, :-1]
        x = self._embed(prefix, self._ordered(codes, order)[:, :-1], order, hidden)
        views = self._views(0, x.shape[1], self._said(prefix), order)
        for block, view in zip(self.blocks, views, strict=True):
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, view, use_reentrant=False)
            else:
                x = block(x, view)
        return self.norm(x)

    def _code_logits(self, x: Tensor, codes: Tensor, order: Tensor | None) -> Tensor:
        """The trunk's output (B, P + S - 1, E) and the codes (B, T) -> (B, T, K)."""
        states = x[:, self.prefix_length - 1 :]
        if order is not None:  # back to the places of the grid
            states = states.take_along_dim(order.argsort(1).unsqueeze(2), 1)
        return self.code_head(states, self._ordered(codes, None)).flatten(1, 2)

    # Sampling --------------------------------------------------------------------------------------------------------

    def prefill(
        self, prefix: Tensor, length: int, *, order: Tensor | None = None, known: Tensor | None = None
    ) -> tuple[Tensor, KeyValueCache]:
        """As the contract says; image positions are drawn in `order` (R, S), and the `known` codes (R, n·Q) of the
        first n of them are read with the prefix, and counted in `length`."""
        config, order = self.config, self._order(len(prefix), order)
        room = prefix.shape[1] + length // self.num_codebooks
        shape = (config.depth, len(prefix), config.num_heads, room, config.dim // config.num_heads)
        empty = self.text_embedding.weight.new_zeros(shape)
        cache = KeyValueCache(
            empty, torch.zeros_like(empty), 0, empty[0, :, 0, 0], prefix[:, :0], self._said(prefix), order
        )
        codes = self._ordered(prefix[:, :0] if known is None else known, None)  # (R, n, Q)
        return self._advance(self._embed(prefix, codes, order), cache), cache

    def step(self, codes: Tensor, cache: Cache) -> Tensor:
        assert isinstance(cache, KeyValueCache)
        cache.drawn = torch.cat([cache.drawn, codes.unsqueeze(1)], dim=1)
        if cache.drawn.shape[1] < self.num_codebooks:
            return self.code_head.logits(cache.state, cache.drawn)
        first = cache.length - self.prefix_length
        return self._advance(self._embed_codes(cache.drawn.unsqueeze(1), first, cache.order), cache)

    def _advance(self, x: Tensor, cache: KeyValueCache) -> Tensor:
        """New positions (N, new, E) -> logits of the first code after the last one (N, K)."""
        views = self._views(cache.length, cache.length + x.shape[1], cache.said, cache.order)
        for layer, (block, view) in enumerate(zip(self.blocks, views, strict=True)):
            x = block(x, view, cache, layer)
        cache.length += x.shape[1]
        cache.state, cache.drawn = self.norm(x[:, -1]), cache.drawn[:, :0]
        return self.code_head.logits(cache.state, cache.drawn)

    def cache_numbers(self) -> int:
        positions = self.prefix_length + self.length // self.num_codebooks
        return 2 * self.config.depth * positions * self.config.dim

    # Order -----------------------------------------------------------------------------------------------------------

    def _order(self, rows: int, order: Tensor | None) -> Tensor | None:
        """(rows, S): the order given or row after row; None for a prior that knows no other."""
        if self.config.order == "raster":
            assert order is None
            return None
        if order is None:
            positions = torch.arange(self.length // self.num_codebooks, device=self.row_target.device)
            order = positions.expand(rows, -1)
        return order

    def _ordered(self, codes: Tensor, order: Tensor | None) -> Tensor:
        """The codes (B, n·Q) of positions, as they are or in `order` -> (B, n, Q)."""
        positions = rearrange(codes, "b (s q) -> b s q", q=self.num_codebooks)
        return positions if order is None else positions.take_along_dim(order.unsqueeze(2), 1)

    # Embeddings ------------------------------------------------------------------------------------------------------

    def _embed(self, prefix: Tensor, codes: Tensor, order: Tensor | None, hidden: Tensor | None = None) -> Tensor:
        """Text (B, P) and the codes (B, n, Q) of the positions that are read first -> (B, P + n, E)."""
        text = self.text_embedding(prefix)
        if self.config.positions == "learned":
            text = text + self.text_position
        if order is not None:  # the last of the text foretells the first code
            text = torch.cat([text[:, :-1], text[:, -1:] + self._targets(order[:, :1])], dim=1)
        return torch.cat([text, self._embed_codes(codes, 0, order, hidden)], dim=1)

    def _embed_codes(self, codes: Tensor, first: int, order: Tensor | None, hidden: Tensor | None = None) -> Tensor:
        """The codes (B, n, Q) of the positions that are read from `first` on -> (B, n, E); the hidden ones as zeros."""
        table = torch.arange(self.num_codebooks, device=codes.device) * self.codebook_size  # each codebook its own rows
        x, last = self.code_embedding(codes + table).sum(2), first + codes.shape[1]
        if hidden is not None:
            x = x.masked_fill(hidden.unsqueeze(2), 0.0)
        if self.config.positions == "learned":
            positions = (self.row_position + self.column_position).flatten(0, 1)  # (S, E)
            x = x + (positions[first:last] if order is None else positions[order[:, first:last]])
        return x if order is None else x + self._targets(order[:, first + 1 : last + 1])

    def _targets(self, order: Tensor) -> Tensor:
        """Image positions (B, n) that are to be foretold -> (B, n, E)."""
        return (self.row_target + self.column_target).flatten(0, 1)[order]

    # Views -----------------------------------------------------------------------------------------------------------

    def _said(self, prefix: Tensor) -> Tensor | None:
        """Text positions that others may see, (B, P) bool; None for all."""
        return prefix != PAD if self.config.padding == "masked" and self.condition == "text" else None

    def _views(self, first: int, last: int, said: Tensor | None, order: Tensor | None) -> list[View]:
        """How the positions from `first` to `last` look at the sequence, layer by layer."""
        config, device = self.config, self.text_embedding.weight.device
        (_, *grid), text = config.code_shape, self.prefix_length
        height, width = grid
        turned = None
        if config.positions != "learned":
            axes: Axes = 1 if config.positions == "rotary" else 2
            table = rotation(axes, text, (height, width), config.dim // config.num_heads, device)
            if order is None:
                turned = table.slice(first, last)
            else:
                own = torch.arange(text, device=device).expand(len(order), -1)
                turned = table.at(torch.cat([own, text + order], dim=1)[:, first:last])
        masks: dict[Pattern, Tensor | None] = {"full": None}
        queries, keys = torch.arange(first, last, device=device), torch.arange(last, device=device)
        for pattern in dict.fromkeys(self.patterns):
            if pattern == "full" and said is None:
                continue
            mask = visible(pattern, queries, keys, text, (height, width), config.convolution_kernel)
            if said is not None:  # a padding that sees nothing before it sees itself
                others = F.pad(said[:, :last], (0, max(0, last - text)), value=True)[:, None, None]  # (B, 1, 1, L)
                mask = mask & others | (queries.unsqueeze(1) == keys)
            masks[pattern] = mask
        return [View(masks[pattern], turned) for pattern in self.patterns]


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        hidden, self.gated = int(config.dim * config.mlp_ratio), config.mlp == "swiglu"
        self.attention_norm = RMSNorm(config.dim)
        self.attention = Attention(config.dim, config.num_heads, config.qk_norm)
        self.mlp_norm = RMSNorm(config.dim)
        self.mlp_in = Linear(config.dim, 2 * hidden if self.gated else hidden)
        self.mlp_out = Linear(hidden, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.zeros_(self.mlp_out.weight)  # each block starts as the identity

    def forward(self, x: Tensor, view: View, cache: KeyValueCache | None = None, layer: int = 0) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), view, cache, layer))
        return x + self.dropout(self._mlp(self.mlp_norm(x)))

    def _mlp(self, x: Tensor) -> Tensor:
        hidden = self.mlp_in(x)
        if not self.gated:
            return gelu_linear(hidden, self.mlp_out)
        gate, value = hidden.chunk(2, dim=-1)
        return self.mlp_out(F.silu(gate) * value)
