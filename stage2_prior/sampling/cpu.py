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
from stage2_prior.gpt import GPTPrior
from stage2_prior.sampling import kernels
from stage2_prior.sampling.engine import Engine
from stage2_prior.sampling.kernels import Matrix, Packed, Segment
from stage2_prior.sampling.settings import Precision
from stage2_prior.sampling.weights import read_weights


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
        self, prefix: KeysAndValues, prefix_rows: Tensor, suffix: KeysAndValues | None, length: Tensor, state: Tensor,
        codes: Tensor, room: int,
    ) -> None:  # fmt: skip
        self.prefix, self.prefix_rows = prefix, prefix_rows  # of R rows, shared; (N,) int32, which of them each reads
        self.suffix, self.length = suffix, length  # of N rows, None until one is written; (N,) int32, positions written
        self.state, self.codes = state, codes  # (N, E), the trunk's last output; (N, q), the first codes after it
        self.room = room  # positions

    def repeat(self, rows: Tensor) -> "CPUCache":
        suffix = None if self.suffix is None else self.suffix[rows]
        return CPUCache(
            self.prefix, self.prefix_rows[rows], suffix, self.length[rows], self.state[rows], self.codes[rows],
            self.room,
        )  # fmt: skip


class Pace:
    """How many threads are fastest, found by trying half and twice as many now and then.

    All of them are not the fastest where a step is short or other programs use the processor, because threads wait for
    the slowest many times a step. The results do not depend on the number.
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


class PackedWeights:
    """A copy of a prior's weights in the order and the precision of the kernels."""

    def __init__(self, prior: GPTPrior, precision: Precision) -> None:
        weights = read_weights(prior)
        self._kept: list[Tensor | Packed] = []  # what the pointers below point into
        self.text_embedding, self.text_position = _floats(weights.text_embedding), _floats(weights.text_position)
        self.code_embedding, self.code_position = _floats(weights.code_embedding), _floats(weights.code_position)
        self.depth, self.num_heads, self.dim = len(weights.layers), weights.num_heads, len(weights.norm)

        def vector(parameter: Tensor) -> int:
            self._kept.append(floats := _floats(parameter))
            return floats.data_ptr()

        def matrix(parameter: Tensor) -> Matrix:
            self._kept.append(packed := Packed(parameter, precision))
            return packed.matrix

        self.blocks = (kernels.Block * self.depth)()
        for layer, block in zip(weights.layers, self.blocks, strict=True):
            for name, parameter in layer._asdict().items():
                setattr(block, name, (vector if parameter.ndim == 1 else matrix)(parameter))
        self.norm, self.head = vector(weights.norm), matrix(weights.head)
        self.depth_embeddings = [_floats(depth.embedding) for depth in weights.depths]
        self.depths = [
            (vector(one.norm), matrix(one.mlp_in), matrix(one.mlp_out), vector(one.norm_out), matrix(one.head))
            for one in weights.depths
        ]


class CPUEngine(Engine):
    """`prefill` and `step` of a GPTPrior's contract; it holds a copy of the weights, packed."""

    prior: GPTPrior
    precision: Precision

    def __init__(self, prior: GPTPrior, precision: Precision) -> None:
        """Raises native.Unavailable when there is no compiler, or it fails."""
        self.library, self.prior, self.precision = kernels.load(), prior, precision
        self.num_codebooks, self.codebook_size = prior.num_codebooks, prior.codebook_size
        self.cache_dtype = torch.float32 if precision == "float32" else torch.bfloat16
        self.tables = torch.arange(self.num_codebooks) * self.codebook_size  # each codebook its own rows
        self.paces: defaultdict[int, Pace] = defaultdict(Pace)  # by the number of rows, to a factor of two
        self.refresh()

    def refresh(self) -> None:
        self.weights = PackedWeights(self.prior, self.precision)
        super().refresh()

    def prefill(self, prefix: Tensor, length: int) -> tuple[Tensor, CPUCache]:
        rows, positions = prefix.shape
        keys_and_values = self._allocate(rows, positions)
        x = self.weights.text_embedding[prefix] + self.weights.text_position  # (R, P, E)
        start = torch.zeros(rows, dtype=torch.int32)
        self._trunk(x, start, None, start, keys_and_values)
        state, logits = self._head(x[:, -1].contiguous())
        prefix_rows = torch.arange(rows, dtype=torch.int32)
        room = length // self.num_codebooks
        return logits, CPUCache(keys_and_values, prefix_rows, None, start, state, prefix[:, :0], room)

    def step(self, codes: Tensor, cache: Cache) -> Tensor:
        assert isinstance(cache, CPUCache)
        cache.codes = torch.cat([cache.codes, codes.unsqueeze(1)], dim=1)
        if cache.codes.shape[1] < self.num_codebooks:
            return self.depth_logits(cache.state, cache.codes)
        x = self.advance(cache.codes, cache)  # (N, 1, E)
        cache.length = cache.length + 1
        cache.state, logits = self._head(x[:, 0])
        cache.codes = cache.codes[:, :0]
        return logits

    def advance(self, codes: Tensor, cache: CPUCache) -> Tensor:
        """All codes (N, S·Q) of the next S positions -> the trunk's output (N, S, E), before the last norm.

        The keys and values are written from `cache.length` on, which is left to the caller to move: positions that turn
        out wrong are written again.
        """
        if cache.suffix is None:
            cache.suffix = self._allocate(len(codes), max(1, cache.room))
        codes = rearrange(codes, "n (s q) -> n s q", q=self.num_codebooks)
        positions = cache.length[:, None] + torch.arange(codes.shape[1])  # (N, S)
        x = self.weights.code_embedding[codes + self.tables].sum(2)
        # A window may reach beyond the last position.
        x += self.weights.code_position[positions.clamp_max(len(self.weights.code_position) - 1)]
        self._trunk(x, cache.length, cache.prefix, cache.prefix_rows, cache.suffix)
        return x

    def head_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The trunk's output (..., E) -> the state that the depths read (..., E), the first code's logits (..., K)."""
        state, logits = self._head(x.reshape(-1, self.weights.dim))
        return state.view(x.shape), logits.view(*x.shape[:-1], -1)

    def depth_logits(self, state: Tensor, before: Tensor) -> Tensor:
        """States (..., E) and the q > 0 first codes of their positions (..., q) -> logits of the next code (..., K)."""
        x = state
        for embedding, codes in zip(self.weights.depth_embeddings, before.unbind(-1), strict=False):
            x = x + embedding[codes]
        norm, mlp_in, mlp_out, norm_out, head = self.weights.depths[before.shape[-1] - 1]
        rows = x.numel() // self.weights.dim
        logits = torch.empty(*state.shape[:-1], self.codebook_size)
        self.library.depth_head(
            x.data_ptr(), rows, norm, ctypes.byref(mlp_in), ctypes.byref(mlp_out), norm_out, ctypes.byref(head),
            logits.data_ptr(), self._threads(rows),
        )  # fmt: skip
        return logits

    # Inside ----------------------------------------------------------------------------------------------------------

    def _allocate(self, rows: int, positions: int) -> KeysAndValues:
        weights = self.weights
        head_dim = weights.dim // weights.num_heads
        return KeysAndValues.allocate(weights.depth, rows, weights.num_heads, positions, head_dim, self.cache_dtype)

    def _trunk(
        self, x: Tensor, start: Tensor, prefix: KeysAndValues | None, prefix_rows: Tensor, written: KeysAndValues
    ) -> None:
        """New positions x (N, S, E) -> the last block's output, in place; their keys and values are `written`."""
        weights, (rows, new, _) = self.weights, x.shape
        shared = written.segment if prefix is None else prefix.segment

        def run(threads: int) -> None:
            self.library.trunk(
                weights.blocks, weights.depth, weights.num_heads, weights.dim, x.data_ptr(), rows, new,
                start.data_ptr(), ctypes.byref(shared), prefix_rows.data_ptr(),
                0 if prefix is None else self.prior.prefix_length, ctypes.byref(written.segment), threads,
            )  # fmt: skip

        self.paces[(rows * new).bit_length()].run(run)

    def _head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(M, E) -> normed (M, E), logits (M, K)."""
        state, logits = torch.empty_like(x), torch.empty(len(x), self.codebook_size)
        self.library.norm_and_product(
            x.data_ptr(), len(x), self.weights.norm, ctypes.byref(self.weights.head), state.data_ptr(),
            logits.data_ptr(), self._threads(len(x)),
        )  # fmt: skip
        return state, logits

    def _threads(self, rows: int) -> int:
        return self.paces[rows.bit_length()].threads or torch.get_num_threads()


def _floats(parameter: Tensor) -> Tensor:
    """A float32 copy: what the prior becomes later does not reach it."""
    return parameter.detach().to(torch.float32, copy=True).contiguous()
