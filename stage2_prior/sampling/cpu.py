"""The GPT prior's steps on a CPU through `kernels.cpp`: packed weights, a prefix read in place, rows that stand alone.

A row's numbers do not depend on the rows beside it, on the number of threads or on how many new positions come at once
(see kernels.cpp), so candidate i is the same, bit for bit, in a batch of 1 or 64 and with or without speculation.

Letters: R prefixes, N sequences, S new positions of each, Q codebooks, K codebook size, E width, P prefix.
"""

import ctypes
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from stage2_prior.base import Cache
from stage2_prior.sampling import kernels
from stage2_prior.sampling.kernels import Matrix, Packed, Segment
from stage2_prior.sampling.settings import Precision
from stage2_prior.gpt import Block, GPTPrior


class KeysAndValues:
    """What attention reads of some rows: allocated once, filled from the left, never copied to read it."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values  # (depth, rows, heads, capacity / W, d, W); (.., capacity, d in whole W)
        kind: Precision = "float32" if keys.dtype == torch.float32 else "bfloat16"
        self.segment = Segment(keys.data_ptr(), values.data_ptr(), keys.shape[1], values.shape[3], kernels.KINDS[kind])

    @classmethod
    def allocate(cls, depth: int, rows: int, heads: int, positions: int, d: int, dtype: torch.dtype) -> "KeysAndValues":
        lanes = kernels.load().lanes()
        blocks, wide = -(-positions // lanes), -(-d // lanes) * lanes
        return cls(
            torch.empty(depth, rows, heads, blocks, d, lanes, dtype=dtype),
            torch.empty(depth, rows, heads, blocks * lanes, wide, dtype=dtype),
        )

    def __getitem__(self, rows: Tensor) -> "KeysAndValues":
        return KeysAndValues(self.keys[:, rows], self.values[:, rows])


class CPUCache(Cache):
    def __init__(
        self, prefix: KeysAndValues, prefix_of: Tensor, own: KeysAndValues | None, start: Tensor, state: Tensor,
        drawn: Tensor, room: int,
    ) -> None:  # fmt: skip
        self.prefix, self.prefix_of = prefix, prefix_of  # of R rows, shared; (N,) int32, which of them each reads
        self.own, self.start = own, start  # of N rows, None until something is written; (N,) int32, positions written
        self.state, self.drawn = state, drawn  # (N, E), the trunk's last output; (N, q), the codes drawn from it so far
        self.room = room  # positions

    def repeat(self, rows: Tensor) -> "CPUCache":
        own = None if self.own is None else self.own[rows]
        return CPUCache(
            self.prefix, self.prefix_of[rows], own, self.start[rows], self.state[rows], self.drawn[rows], self.room
        )


class Pace:
    """How many threads are fastest, found by trying half and twice as many now and then.

    All of them are not where a step is short, or other programs want the processor: threads wait for each other many
    times a step, and so for the slowest. What comes out does not depend on it.
    """

    def __init__(self) -> None:
        self.threads, self.usual = 0, 0.0  # seconds a step took of late
        self.steps, self.next_trial, self.gap, self.fewer = 0, 3, 4, True

    def run(self, call: Callable[[int], None]) -> None:
        most = torch.get_num_threads()
        now = other = min(self.threads, most) or most
        self.steps += 1
        if self.steps == self.next_trial:
            other = max(1, now // 2) if self.fewer or 2 * now > most else 2 * now
            self.fewer, self.gap = not self.fewer, min(2 * self.gap, 64)
            self.next_trial += self.gap
        begin = time.perf_counter()
        call(other)
        took = time.perf_counter() - begin
        if other != now and took < 0.9 * self.usual:
            now, self.usual = other, took
        elif other == now:
            self.usual = 0.7 * self.usual + 0.3 * took if self.usual else took
        self.threads = now


class CPUEngine:
    """`prefill` and `step` of a GPTPrior's contract; it holds its own copy of the weights, packed."""

    def __init__(self, prior: GPTPrior, precision: Precision) -> None:
        """Raises native.Unavailable when there is no compiler, or it fails."""
        self.library, config = kernels.load(), prior.config
        self.precision, self.dim, self.num_heads, self.depth = precision, config.dim, config.num_heads, config.depth
        self.num_codebooks, self.codebook_size = prior.num_codebooks, prior.codebook_size
        self.prefix_length = prior.prefix_length
        self.cached = torch.float32 if precision == "float32" else torch.bfloat16
        self.paces: defaultdict[int, Pace] = defaultdict(Pace)  # by the number of rows, to a factor of two
        self._kept: list[Tensor | Packed] = []  # what the structures below point into

        self.text_embedding, self.text_position = _floats(prior.text_embedding.weight), _floats(prior.text_position)
        self.code_embedding = _floats(prior.code_embedding.weight)
        self.positions = _floats((prior.row_position + prior.column_position).flatten(0, 1))  # (h·w, E)
        self.tables = torch.arange(self.num_codebooks) * self.codebook_size  # each codebook its own rows
        self.blocks = (kernels.Block * config.depth)()
        for block, into in zip(prior.blocks, self.blocks, strict=True):
            assert isinstance(block, Block)
            into.attention_norm = self._vector(block.attention_norm.weight)
            into.query_scale = self._vector(block.attention.query_scale)
            into.key_scale = self._vector(block.attention.key_scale)
            into.mlp_norm = self._vector(block.mlp_norm.weight)
            into.qkv, into.out = self._matrix(block.attention.qkv.weight), self._matrix(block.attention.out.weight)
            into.mlp_in, into.mlp_out = self._matrix(block.mlp_in.weight), self._matrix(block.mlp_out.weight)
        self.norm = self._vector(prior.norm.weight)
        head = prior.code_head
        self.head = self._matrix(head.weight)
        self.depth_embeddings = [_floats(embedding.get_parameter("weight")) for embedding in head.embeddings]
        self.depths = [
            (self._vector(block.get_parameter("norm.weight")), self._matrix(block.get_parameter("mlp_in.weight")),
             self._matrix(block.get_parameter("mlp_out.weight")), self._vector(block.get_parameter("norm_out.weight")),
             self._matrix(deeper.get_parameter("weight")))
            for block, deeper in zip(head.blocks, head.heads, strict=True)
        ]  # fmt: skip

    def prefill(self, prefix: Tensor, length: int) -> tuple[Tensor, CPUCache]:
        rows, positions = prefix.shape
        seen = KeysAndValues.allocate(self.depth, rows, self.num_heads, positions, self.head_dim, self.cached)
        x = self.text_embedding[prefix] + self.text_position  # (R, P, E)
        start = torch.zeros(rows, dtype=torch.int32)
        self._trunk(x, start, None, start, seen)
        state, logits = self._head(x[:, -1].contiguous())
        prefix_of = torch.arange(rows, dtype=torch.int32)
        cache = CPUCache(seen, prefix_of, None, start, state, prefix[:, :0], length // self.num_codebooks)
        return logits, cache

    def step(self, codes: Tensor, cache: Cache) -> Tensor:
        assert isinstance(cache, CPUCache)
        cache.drawn = torch.cat([cache.drawn, codes.unsqueeze(1)], dim=1)
        if cache.drawn.shape[1] < self.num_codebooks:
            return self.depth_logits(cache.state, cache.drawn)
        x = self.advance(cache.drawn, cache)  # (N, 1, E)
        cache.start = cache.start + 1
        cache.state, logits = self._head(x[:, 0])
        cache.drawn = cache.drawn[:, :0]
        return logits

    def advance(self, codes: Tensor, cache: CPUCache) -> Tensor:
        """All codes (N, S·Q) of the next S positions -> the trunk's output (N, S, E), before the last norm.

        The keys and values are written from `cache.start` on, which is left to the caller to move: positions that turn
        out wrong are written again.
        """
        if cache.own is None:
            cache.own = KeysAndValues.allocate(
                self.depth, len(codes), self.num_heads, max(1, cache.room), self.head_dim, self.cached
            )
        codes = rearrange(codes, "n (s q) -> n s q", q=self.num_codebooks)
        where = cache.start[:, None] + torch.arange(codes.shape[1])  # (N, S)
        x = self.code_embedding[codes + self.tables].sum(2)
        x += self.positions[where.clamp_max(len(self.positions) - 1)]  # a window may reach beyond the last one
        self._trunk(x, cache.start, cache.prefix, cache.prefix_of, cache.own)
        return x

    def head_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The trunk's output (..., E) -> the state that the depths read (..., E), the first code's logits (..., K)."""
        state, logits = self._head(x.reshape(-1, self.dim))
        return state.view(x.shape), logits.view(*x.shape[:-1], -1)

    def depth_logits(self, state: Tensor, before: Tensor) -> Tensor:
        """States (..., E) and the q > 0 first codes of their positions (..., q) -> logits of the next code (..., K)."""
        x = state
        for embedding, codes in zip(self.depth_embeddings, before.unbind(-1), strict=False):
            x = x + embedding[codes]
        norm, mlp_in, mlp_out, norm_out, head = self.depths[before.shape[-1] - 1]
        logits = torch.empty(*state.shape[:-1], self.codebook_size)
        self.library.depth_head(
            x.data_ptr(), x.numel() // self.dim, norm, ctypes.byref(mlp_in), ctypes.byref(mlp_out), norm_out,
            ctypes.byref(head), logits.data_ptr(), self._threads(x.numel() // self.dim),
        )  # fmt: skip
        return logits

    # Inside ----------------------------------------------------------------------------------------------------------

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def _trunk(
        self, x: Tensor, start: Tensor, prefix: KeysAndValues | None, prefix_of: Tensor, own: KeysAndValues
    ) -> None:
        """New positions x (N, S, E) -> the last block's output, in place."""
        rows, new, _ = x.shape
        shared = own.segment if prefix is None else prefix.segment

        def run(threads: int) -> None:
            self.library.trunk(
                self.blocks, self.depth, self.num_heads, self.dim, x.data_ptr(), rows, new, start.data_ptr(),
                ctypes.byref(shared), prefix_of.data_ptr(), 0 if prefix is None else self.prefix_length,
                ctypes.byref(own.segment), threads,
            )  # fmt: skip

        self.paces[(rows * new).bit_length()].run(run)

    def _head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(M, E) -> normed (M, E), logits (M, K)."""
        state, logits = torch.empty_like(x), torch.empty(len(x), self.codebook_size)
        self.library.norm_and_product(
            x.data_ptr(), len(x), self.norm, ctypes.byref(self.head), state.data_ptr(), logits.data_ptr(),
            self._threads(len(x)),
        )  # fmt: skip
        return state, logits

    def _threads(self, rows: int) -> int:
        return self.paces[rows.bit_length()].threads or torch.get_num_threads()

    def _vector(self, parameter: Tensor) -> int:
        floats = _floats(parameter)
        self._kept.append(floats)
        return floats.data_ptr()

    def _matrix(self, parameter: Tensor) -> Matrix:
        packed = Packed(parameter, self.precision)
        self._kept.append(packed)
        return packed.matrix


def _floats(parameter: Tensor) -> Tensor:
    """The values as float32 numbers of our own: what the prior becomes later does not reach a drawing under way."""
    return parameter.detach().to(torch.float32, copy=True).contiguous()
