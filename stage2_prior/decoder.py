"""The causal transformer trunk of every prior: one way forward, one cache, one step.

A prior over it says how its condition and its codes are embedded and how states become logits (`base.py`
`DecoderPrior`); what differs between GPT, minDALL-E, ruDALL-E, taming's transformer, LlamaGen, Janus and the decoder of
DALL·E mini is a `DecoderSpec`. The trunk reads embeddings of P prefix positions and then of the image positions, in
raster order or in any other, and says at each position what is known about the next one.

Letters: N sequences, P prefix positions, S = h·w image positions, n new positions, L positions so far, M positions of
a memory that cross-attention reads, E width, d channels of a head.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stage2_prior.base import Cache
from stage2_prior.masks import Pattern, pattern_mask, with_look_ahead, with_padding
from stage2_prior.positions import RotarySpec, Rotation, rotate, rotation
from tessera.config import Config

Activation = Literal["gelu", "gelu-tanh", "gelu-sigmoid", "swiglu", "geglu"]  # the last two are gated, Shazeer 2020


class DecoderSpec(Config):
    dim: int = Field(ge=1)  # E
    depth: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    mlp_dim: int = Field(ge=1)  # hidden width; a gated MLP has a gate of the same width beside it
    activation: Activation = "gelu"
    num_kv_heads: int | None = Field(None, ge=1)  # of keys and values, each shared by several queries; None: num_heads
    head_dim: int | None = Field(None, ge=1)  # d; None: E / num_heads
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = Field(1e-5, gt=0)
    attention_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False  # queries and keys have a root mean square of 1 (Henry et al. 2020), with learned scales
    attention_norm_out: bool = False  # a norm behind attention (CogView, Ding et al. 2021; NormFormer)
    mlp_norm_out: bool = False  # a norm behind the MLP (CogView)
    mlp_hidden_norm: bool = False  # a norm of the MLP's hidden layer (NormFormer, Shleifer et al. 2021)
    cross_attention: bool = False  # each block also reads a memory
    dropout: float = Field(0.0, ge=0, lt=1)
    prefix_length: int = Field(ge=0)  # P
    grid: tuple[int, int]  # h, w
    rotary: RotarySpec | None = None  # None: positions are in the embeddings
    patterns: tuple[Pattern, ...] = ("full",)  # of the layers, over and over
    window: int = Field(11, ge=1)  # positions a side of a convolution or square; odd
    pattern_prefix: int | None = None  # positions that patterns count as the prefix; None: P
    look_ahead: int = Field(0, ge=0)  # the first so many positions attend to each other in both directions

    @model_validator(mode="after")
    def _consistent(self) -> "DecoderSpec":
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(f"dim must be divisible by num_heads, got {self.dim} and {self.num_heads}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads must be divisible by num_kv_heads, got {self.num_heads} and {self.kv_heads}")
        multiple = 0 if self.rotary is None else 2 * self.rotary.axes
        if multiple and self.head_width % multiple:
            raise ValueError(f"rotary positions need a multiple of {multiple} channels a head, got {self.head_width}")
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.dim // self.num_heads

    @property
    def gated(self) -> bool:
        return self.activation in ("swiglu", "geglu")


class View(NamedTuple):
    """How new positions look at the sequence, in one layer."""

    mask: Tensor | None = None  # (n, L) or (N, 1, n, L) bool, True where a position attends to another; None: causal
    rotation: Rotation | None = None  # of the new positions


class Memory(NamedTuple):
    """What cross-attention reads in one layer."""

    keys: Tensor  # (N, heads, M, d)
    values: Tensor
    mask: Tensor  # (N, 1, 1, M) bool, False on padding


class DecoderCache(Cache):
    """Keys and values of all layers, allocated once and filled from the left, and where sampling stands."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        present: Tensor | None,
        order: Tensor | None,
        memory: list[Memory] | None,
    ) -> None:
        self.keys, self.values = keys, values  # (depth, N, kv heads, L, d)
        self.length = 0  # positions filled so far
        self.present = present  # (N, P) bool, False on padding of the prefix; None: no padding
        self.order = order  # (N, S), in which image positions are read; None: raster order
        self.memory = memory  # of each layer, where there is cross-attention
        self.state = keys[0, :, 0, 0]  # (N, E), the trunk's output at the last position
        self.codes = keys.new_zeros(keys.shape[1], 0, dtype=torch.int64)  # (N, q), sampled from that state so far

    def repeat(self, rows: Tensor) -> "DecoderCache":
        memory = self.memory
        if memory is not None:
            memory = [Memory(*(part[rows] for part in layer)) for layer in memory]
        present = None if self.present is None else self.present[rows]
        order = None if self.order is None else self.order[rows]
        cache = DecoderCache(self.keys[:, rows], self.values[:, rows], present, order, memory)
        cache.length, cache.state, cache.codes = self.length, self.state[rows], self.codes[rows]
        return cache

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the keys and values (N, kv heads, n, d) of new positions; returns all up to them."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Decoder(nn.Module):
    activation_checkpointing = (
        False  # in training, blocks are computed again in the backward pass instead of remembered
    )

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.norm = make_norm(spec)

    def forward(
        self,
        x: Tensor,
        *,
        present: Tensor | None = None,
        order: Tensor | None = None,
        memory: Tensor | None = None,
        memory_present: Tensor | None = None,
    ) -> Tensor:
        """Embeddings (N, L, E) of a sequence's first L positions -> normalised states (N, L, E), teacher-forced.

        `present` (N, P) bool is False on padding of the prefix; `order` (N, S) is a permutation of the image positions;
        `memory` (N, M, E) is what cross-attention reads, `memory_present` (N, M) bool.
        """
        memories = self._memories(memory, memory_present)
        return self._run(x, 0, present, order, memories, None)

    def prefill(
        self,
        x: Tensor,
        length: int,
        *,
        present: Tensor | None = None,
        order: Tensor | None = None,
        memory: Tensor | None = None,
        memory_present: Tensor | None = None,
    ) -> tuple[Tensor, DecoderCache]:
        """`forward`, remembered: states (N, n, E), and a cache with room for `length` positions in all."""
        spec = self.spec
        shape = (spec.depth, len(x), spec.kv_heads, length, spec.head_width)
        memories = self._memories(memory, memory_present)
        cache = DecoderCache(x.new_zeros(shape), x.new_zeros(shape), present, order, memories)
        return self._run(x, 0, present, order, memories, cache), cache

    def step(self, x: Tensor, cache: DecoderCache) -> Tensor:
        """The next position (N, 1, E) -> its state (N, 1, E); the cache grows by it."""
        return self._run(x, cache.length, cache.present, cache.order, cache.memory, cache)

    def _run(
        self,
        x: Tensor,
        first: int,
        present: Tensor | None,
        order: Tensor | None,
        memories: list[Memory] | None,
        cache: DecoderCache | None,
    ) -> Tensor:
        last = first + x.shape[1]
        views = self.views(first, last, present, order, x.device)
        for layer, (block, view) in enumerate(zip(self.blocks, views, strict=True)):
            memory = None if memories is None else memories[layer]
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, view, memory, cache, layer, use_reentrant=False)
            else:
                x = block(x, view, memory, cache, layer)
        x = self.norm(x)
        if cache is not None:
            cache.length, cache.state = last, x[:, -1]
        return x

    def views(
        self, first: int, last: int, present: Tensor | None, order: Tensor | None, device: torch.device
    ) -> list[View]:
        """How the positions from `first` to `last` look at the sequence, layer by layer."""
        spec, rotary = self.spec, None
        if spec.rotary is not None:
            rotary = rotation(
                spec.rotary, spec.prefix_length, spec.grid, spec.head_width, first, last, device, order, present
            )
        masks: dict[Pattern, Tensor | None] = {}
        for pattern in dict.fromkeys(spec.patterns):
            mask = None
            if pattern != "full":
                prefix = spec.prefix_length if spec.pattern_prefix is None else spec.pattern_prefix
                length = spec.prefix_length + spec.grid[0] * spec.grid[1]
                mask = pattern_mask(pattern, length, prefix, spec.grid, spec.window, device)[first:last, :last]
            if spec.look_ahead > 1 and first == 0:
                mask = with_look_ahead(mask, last, spec.look_ahead, device)
            if present is not None:
                mask = with_padding(mask, first, last, present)
            masks[pattern] = mask
        patterns = spec.patterns
        return [View(masks[patterns[layer % len(patterns)]], rotary) for layer in range(spec.depth)]

    def _memories(self, memory: Tensor | None, present: Tensor | None) -> list[Memory] | None:
        """The keys and values of each layer, computed once for all steps."""
        if memory is None:
            return None
        assert present is not None
        crosses = [block.cross for block in self.blocks if isinstance(block, Block)]
        return [Memory(*cross.keys_values(memory), present[:, None, None]) for cross in crosses]

    def cache_numbers(self) -> int:
        """How many numbers the keys and values of one whole sequence are."""
        spec = self.spec
        positions = spec.prefix_length + spec.grid[0] * spec.grid[1]
        return 2 * spec.depth * positions * spec.kv_heads * spec.head_width


class Block(nn.Module):
    """Pre-norm attention, cross-attention where the spec has it, and an MLP."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.activation = spec.activation
        self.attention_norm = make_norm(spec)
        self.attention = Attention(spec)
        self.attention_norm_out = make_norm(spec) if spec.attention_norm_out else nn.Identity()
        if spec.cross_attention:
            self.cross_norm = make_norm(spec)
            self.cross = CrossAttention(spec)
            self.cross_norm_out = make_norm(spec) if spec.attention_norm_out else nn.Identity()
        self.mlp_norm = make_norm(spec)
        self.mlp_in = nn.Linear(spec.dim, spec.mlp_dim * (2 if spec.gated else 1), bias=spec.mlp_bias)
        self.mlp_hidden_norm = make_norm(spec, spec.mlp_dim) if spec.mlp_hidden_norm else nn.Identity()
        self.mlp_out = nn.Linear(spec.mlp_dim, spec.dim, bias=spec.mlp_bias)
        self.mlp_norm_out = make_norm(spec) if spec.mlp_norm_out else nn.Identity()
        self.dropout = nn.Dropout(spec.dropout)

    def forward(
        self,
        x: Tensor,
        view: View,
        memory: Memory | None = None,
        cache: DecoderCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """(N, n, E) -> (N, n, E). With a cache, either the first positions come together or a single one does."""
        mixed = self.attention(self.attention_norm(x), view, cache, layer)
        x = x + self.dropout(self.attention_norm_out(mixed))
        if memory is not None:
            mixed = self.cross(self.cross_norm(x), memory)
            x = x + self.dropout(self.cross_norm_out(mixed))
        return x + self.dropout(self.mlp_norm_out(self.mlp(self.mlp_norm(x))))

    def mlp(self, x: Tensor) -> Tensor:
        return self.mlp_out(self.mlp_hidden_norm(activate(self.mlp_in(x), self.activation)))


class Attention(nn.Module):
    """Self-attention with rotary positions, grouped keys and values and normalised queries where the spec has them."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        d = spec.head_width
        self.head_dim, self.eps, self.rotary = d, spec.norm_eps, spec.rotary
        self.widths = [spec.num_heads * d, spec.kv_heads * d, spec.kv_heads * d]  # of queries, keys, values
        self.qk_norm = spec.qk_norm
        self.qkv = nn.Linear(spec.dim, sum(self.widths), bias=spec.attention_bias)
        self.out = nn.Linear(spec.num_heads * d, spec.dim, bias=spec.attention_bias)
        if spec.qk_norm:
            self.query_scale = nn.Parameter(torch.ones(d))
            self.key_scale = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor, view: View, cache: DecoderCache | None = None, layer: int = 0) -> Tensor:
        """(N, n, E) -> (N, n, E)."""
        # Split before the heads move forward, so that the backward pass joins all three gradients in one copy.
        q, k, v = (split_heads(part, self.head_dim) for part in self.qkv(x).split(self.widths, dim=-1))
        if self.qk_norm:
            q, k = self.normalize(q, self.query_scale), self.normalize(k, self.key_scale)
        if view.rotation is not None and self.rotary is not None:
            q, k = (rotate(part, view.rotation, self.rotary.pairs) for part in (q, k))
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        return self.out(join_heads(self.attend(q, k, v, view.mask)))

    def normalize(self, x: Tensor, scale: Tensor) -> Tensor:
        """(N, heads, n, d) with a root mean square of `scale` (d,)."""
        return F.rms_norm(x, scale.shape, scale.to(x.dtype), eps=self.eps)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Queries (N, heads, n, d) over keys and values (N, kv heads, L, d) -> (N, heads, n, d); without a mask n is L
        and attention causal, or n is 1."""
        return attend(q, k, v, mask)


class CrossAttention(nn.Module):
    """Attention to a memory."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_width
        width = spec.num_heads * spec.head_width
        self.q, self.k, self.v = (nn.Linear(spec.dim, width, bias=spec.attention_bias) for _ in range(3))
        self.out = nn.Linear(width, spec.dim, bias=spec.attention_bias)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """(N, M, E) -> two of (N, heads, M, d)."""
        return split_heads(self.k(memory), self.head_dim), split_heads(self.v(memory), self.head_dim)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """(N, n, E) -> (N, n, E)."""
        q = split_heads(self.q(x), self.head_dim)
        return self.out(join_heads(attend(q, memory.keys, memory.values, memory.mask)))


def make_norm(spec: DecoderSpec, width: int | None = None) -> nn.Module:
    kind = nn.RMSNorm if spec.norm == "rms" else nn.LayerNorm
    return kind(width or spec.dim, eps=spec.norm_eps)


def activate(x: Tensor, kind: Activation) -> Tensor:
    """(..., H) -> (..., H); a gated kind takes (..., 2H), the gate first."""
    match kind:
        case "gelu":
            return F.gelu(x)
        case "gelu-tanh":
            return F.gelu(x, approximate="tanh")
        case "gelu-sigmoid":
            return x * (1.702 * x).sigmoid()
        case "swiglu" | "geglu":
            gate, value = x.chunk(2, dim=-1)
            return (F.silu(gate) if kind == "swiglu" else F.gelu(gate)) * value


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention, (N, heads, n, d) over (N, kv heads, L, d); without a mask causal where n > 1."""
    causal, shared = mask is None and q.shape[2] > 1, q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    return rearrange(x, "n s (h d) -> n h s d", d=head_dim)


def join_heads(x: Tensor) -> Tensor:
    return rearrange(x, "n h s d -> n s (h d)")
