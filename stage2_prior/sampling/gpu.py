"""The GPT prior's steps on an NVIDIA GPU: a cache in place, a shared prefix read as one matrix, one CUDA graph a step.

A step of a large prior is hundreds of small kernels, which take longer to launch than to run: captured once as a graph,
they are launched as one. A graph reads the same places each time, so the position is a number on the GPU, and attention
reads the own positions up to the next multiple of BUCKET, those to come masked; a longer cache has a new graph.

Without a GPU the same code runs operation by operation; that is what the tests compare on a CPU.

Letters: R prefixes, N sequences, G = N / R of them in a row for each prefix, Q codebooks, P prefix, L own positions.
"""

import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from stage2_prior.attention import Attention
from stage2_prior.base import Cache
from stage2_prior.fused import rms_norm
from stage2_prior.sampling.quantized import products
from stage2_prior.sampling.settings import Precision
from stage2_prior.gpt import Block, GPTPrior

BUCKET = 64  # own positions


class Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    state: Tensor  # (N, E), where a replay leaves the trunk's output
    logits: Tensor  # (N, K)


class GPUCache(Cache):
    def __init__(
        self, prefix_keys: Tensor, prefix_values: Tensor, keys: Tensor, values: Tensor, length: int, state: Tensor,
        drawn: Tensor,
    ) -> None:  # fmt: skip
        self.prefix_keys, self.prefix_values = prefix_keys, prefix_values  # (depth, R, heads, P, d), shared
        self.keys, self.values = keys, values  # (depth, N, heads, L in whole buckets, d), each sequence's own
        self.length = length  # own positions written
        self.state, self.drawn = state, drawn  # (N, E), the trunk's last output; (N, q), the codes drawn from it so far
        self.codes = drawn.new_zeros(0)  # (N, Q) and (1,): where a graph reads its input
        self.position = torch.tensor([length], device=drawn.device)
        self.graphs: dict[int, Graph] = {}  # by the bucket's end

    def repeat(self, rows: Tensor) -> "GPUCache":
        prefix_keys, prefix_values = self.prefix_keys, self.prefix_values
        group = self.keys.shape[1] // prefix_keys.shape[1]
        of = (rows // group).tolist()
        each = len(of) // prefix_keys.shape[1]
        if of != [i // max(1, each) for i in range(len(of))] or len(of) % prefix_keys.shape[1]:
            # Not the same number of rows for each prefix in its turn: then each prefix that is read has its rows.
            wanted = sorted(set(of))
            each = len(of) // len(wanted)
            if len(of) % len(wanted) or of != [wanted[i // each] for i in range(len(of))]:
                wanted = of
            prefix_keys, prefix_values = prefix_keys[:, wanted], prefix_values[:, wanted]
        keys, values = (
            own[:, rows] if self.length else _empty_like(own, len(rows)) for own in (self.keys, self.values)
        )
        return GPUCache(prefix_keys, prefix_values, keys, values, self.length, self.state[rows], self.drawn[rows])


class GPUEngine:
    """`prefill` and `step` of a GPTPrior's contract, with the prior's own weights.

    Or with copies in 8 bits (`quantized.py`) of those in the blocks; the prefix is still read with the prior's own.
    """

    def __init__(self, prior: GPTPrior, precision: Precision) -> None:
        self._prior = weakref.ref(prior)  # who keeps an engine for a prior does not keep the prior
        self.precision = precision
        self.products = [products(block, precision) for block in prior.blocks if isinstance(block, Block)]

    @property
    def prior(self) -> GPTPrior:
        prior = self._prior()
        assert prior is not None, "an engine outlived its prior"
        return prior

    def prefill(self, prefix: Tensor, length: int) -> tuple[Tensor, GPUCache]:
        logits, seen = self.prior.prefill(prefix, 0)
        depth, rows, heads, _, d = seen.keys.shape
        room = -(-max(1, length // self.prior.num_codebooks) // BUCKET) * BUCKET
        empty = seen.keys.new_zeros(depth, rows, heads, room, d)
        return logits, GPUCache(seen.keys, seen.values, empty, torch.zeros_like(empty), 0, seen.state, seen.drawn)

    def step(self, codes: Tensor, cache: Cache) -> Tensor:
        assert isinstance(cache, GPUCache)
        cache.drawn = torch.cat([cache.drawn, codes.unsqueeze(1)], dim=1)
        if cache.drawn.shape[1] < self.prior.num_codebooks:
            return self.prior.code_head.logits(cache.state, cache.drawn)
        end = (cache.length // BUCKET + 1) * BUCKET
        if codes.is_cuda:
            state, logits = self._replay(cache, end)
        else:
            state, logits = self._advance(cache.drawn, cache.position, end, cache)
        cache.length += 1
        cache.position.add_(1)
        cache.state, cache.drawn = state, cache.drawn[:, :0]
        return logits

    # Inside ----------------------------------------------------------------------------------------------------------

    def _replay(self, cache: GPUCache, end: int) -> tuple[Tensor, Tensor]:
        if not len(cache.codes):
            cache.codes = cache.drawn.clone()
        cache.codes.copy_(cache.drawn)
        if end not in cache.graphs:
            # Running it first lets torch set up what a graph may not; it writes what the graph writes again.
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                self._advance(cache.codes, cache.position, end, cache)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # pictures are decoded beside it
                state, logits = self._advance(cache.codes, cache.position, end, cache)
            cache.graphs[end] = Graph(graph, state, logits)
        made = cache.graphs[end]
        made.graph.replay()
        return made.state.clone(), made.logits.clone()  # the next replay writes over them

    def _advance(self, codes: Tensor, position: Tensor, end: int, cache: GPUCache) -> tuple[Tensor, Tensor]:
        """All codes (N, Q) of the position (1,) -> the trunk's output (N, E), logits of the first code after (N, K)."""
        prior = self.prior
        table = torch.arange(prior.num_codebooks, device=codes.device) * prior.codebook_size
        places = (prior.row_position + prior.column_position).flatten(0, 1)  # (h·w, E)
        x = prior.code_embedding(codes + table).sum(1) + places.index_select(0, position)  # (N, E)
        hidden = torch.arange(end, device=codes.device) > position  # (L,)
        for layer, block in enumerate(prior.blocks):
            assert isinstance(block, Block)
            product = self.products[layer]
            x = x + self._attention(block.attention, block.attention_norm(x), layer, position, hidden, cache)
            x = x + product.mlp_out(F.gelu(product.mlp_in(block.mlp_norm(x))))
        state = prior.norm(x)
        return state, prior.code_head.logits(state, codes[:, :0])

    def _attention(
        self, attention: Attention, x: Tensor, layer: int, position: Tensor, hidden: Tensor, cache: GPUCache
    ) -> Tensor:
        product = self.products[layer]
        q, k, v = rearrange(product.qkv(x), "n (three h d) -> three n h d", three=3, h=attention.num_heads).unbind()
        q, k = rms_norm(q, attention.query_scale), rms_norm(k, attention.key_scale)
        cache.keys[layer].index_copy_(2, position, k.unsqueeze(2))
        cache.values[layer].index_copy_(2, position, v.unsqueeze(2))
        keys, values = cache.keys[layer, :, :, : len(hidden)], cache.values[layer, :, :, : len(hidden)]

        # All queries of a prefix are one matrix against its keys, which are read once and copied never.
        prefixes, length = cache.prefix_keys.shape[1], cache.prefix_keys.shape[3]
        together = rearrange(q, "(r g) h d -> r h g d", r=prefixes)
        shared = together @ cache.prefix_keys[layer].transpose(-1, -2)  # (R, heads, G, P)
        own = (keys @ q.unsqueeze(-1)).squeeze(-1).masked_fill(hidden, -torch.inf)  # (N, heads, L)
        scores = torch.cat([rearrange(shared, "r h g p -> (r g) h p"), own], dim=-1).float()
        weights = (scores * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype)
        before = rearrange(weights[..., :length], "(r g) h p -> r h g p", r=prefixes) @ cache.prefix_values[layer]
        after = (weights[..., length:].unsqueeze(-2) @ values).squeeze(-2)  # (N, heads, d)
        return product.out((rearrange(before, "r h g d -> (r g) h d") + after).flatten(1))


def _empty_like(own: Tensor, rows: int) -> Tensor:
    return own.new_zeros(own.shape[0], rows, *own.shape[2:])
