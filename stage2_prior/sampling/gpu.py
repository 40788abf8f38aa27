"""The GPT prior's steps on an NVIDIA GPU: a cache in place, a shared prefix read as one matrix, one CUDA graph a step.

A step of a large prior is hundreds of small kernels, which take longer to launch than to run: captured once as a graph,
they are launched as one. A graph reads the same addresses every time, so the position is a number on the GPU, and
attention reads the suffix, a sequence's positions after the prefix, up to the next multiple of BUCKET, those to come
masked; a longer suffix has a new graph.

Without a GPU the same code runs operation by operation; that is what the tests compare on a CPU.

Letters: R prefixes, N sequences, G = N / R of them in a row for each prefix, Q codebooks, P prefix, L positions of the
suffix.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from stage2_prior.base import Cache
from stage2_prior.gpt import GPTPrior
from stage2_prior.sampling.engine import Engine
from stage2_prior.sampling.quantized import products
from stage2_prior.sampling.settings import Precision
from stage2_prior.sampling.weights import EPS, read_weights

BUCKET = 64  # positions of the suffix


class Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    state: Tensor  # (N, E), where a replay leaves the trunk's output
    logits: Tensor  # (N, K)


class GPUCache(Cache):
    def __init__(
        self, prefix_keys: Tensor, prefix_values: Tensor, keys: Tensor, values: Tensor, length: int, state: Tensor,
        codes: Tensor,
    ) -> None:  # fmt: skip
        self.prefix_keys, self.prefix_values = prefix_keys, prefix_values  # (depth, R, heads, P, d), shared
        self.keys, self.values = keys, values  # (depth, N, heads, L in whole buckets, d), of each sequence
        self.length = length  # suffix positions written
        self.state, self.codes = state, codes  # (N, E), the trunk's last output; (N, q), the first codes after it
        self.graph_codes = codes.new_zeros(0)  # (N, Q) and (1,): where a graph reads its input
        self.graph_position = torch.tensor([length], device=codes.device)
        self.graphs: dict[int, Graph] = {}  # by the bucket's end

    def repeat(self, rows: Tensor) -> "GPUCache":
        prefix_keys, prefix_values = self.prefix_keys, self.prefix_values
        group = self.keys.shape[1] // prefix_keys.shape[1]
        prefixes = (rows // group).tolist()
        size = len(prefixes) // prefix_keys.shape[1]
        if prefixes != [i // max(1, size) for i in range(len(prefixes))] or len(prefixes) % prefix_keys.shape[1]:
            # Not the same number of rows for each prefix in its turn: then each prefix that is read has its rows.
            distinct = sorted(set(prefixes))
            size = len(prefixes) // len(distinct)
            if len(prefixes) % len(distinct) or prefixes != [distinct[i // size] for i in range(len(prefixes))]:
                distinct = prefixes
            prefix_keys, prefix_values = prefix_keys[:, distinct], prefix_values[:, distinct]
        keys, values = (
            cached[:, rows] if self.length else cached.new_zeros(len(cached), len(rows), *cached.shape[2:])
            for cached in (self.keys, self.values)
        )
        return GPUCache(prefix_keys, prefix_values, keys, values, self.length, self.state[rows], self.codes[rows])


class GPUEngine(Engine):
    """`prefill` and `step` of a GPTPrior's contract, with the prior's weights.

    Or with copies in 8 bits (`quantized.py`) of those in the blocks; the prefix is still read with the prior's.
    """

    prior: GPTPrior
    precision: Precision

    def __init__(self, prior: GPTPrior, precision: Precision) -> None:
        self.prior, self.precision = prior, precision
        self.refresh()

    def refresh(self) -> None:
        self.weights = read_weights(self.prior)
        self.products = [products(layer, self.precision) for layer in self.weights.layers]
        super().refresh()

    def prefill(self, prefix: Tensor, length: int) -> tuple[Tensor, GPUCache]:
        logits, cache = self.prior.prefill(prefix, 0)
        depth, rows, heads, _, d = cache.keys.shape
        room = -(-max(1, length // self.prior.num_codebooks) // BUCKET) * BUCKET
        empty = cache.keys.new_zeros(depth, rows, heads, room, d)
        return logits, GPUCache(cache.keys, cache.values, empty, torch.zeros_like(empty), 0, cache.state, prefix[:, :0])

    def step(self, codes: Tensor, cache: Cache) -> Tensor:
        assert isinstance(cache, GPUCache)
        cache.codes = torch.cat([cache.codes, codes.unsqueeze(1)], dim=1)
        if cache.codes.shape[1] < self.prior.num_codebooks:
            return self.prior.code_head.logits(cache.state, cache.codes)
        end = (cache.length // BUCKET + 1) * BUCKET
        if codes.is_cuda:
            state, logits = self._replay(cache, end)
        else:
            state, logits = self._advance(cache.codes, cache.graph_position, end, cache)
        cache.length += 1
        cache.graph_position.add_(1)
        cache.state, cache.codes = state, cache.codes[:, :0]
        return logits

    # Inside ----------------------------------------------------------------------------------------------------------

    def _replay(self, cache: GPUCache, end: int) -> tuple[Tensor, Tensor]:
        if not len(cache.graph_codes):
            cache.graph_codes = cache.codes.clone()
        cache.graph_codes.copy_(cache.codes)
        if end not in cache.graphs:
            # Running it first lets torch set up what a graph may not; it writes what the graph writes again.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._advance(cache.graph_codes, cache.graph_position, end, cache)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # images are decoded beside it
                state, logits = self._advance(cache.graph_codes, cache.graph_position, end, cache)
            cache.graphs[end] = Graph(graph, state, logits)
        graph, state, logits = cache.graphs[end]
        graph.replay()
        return state.clone(), logits.clone()  # the next replay writes over them

    def _advance(self, codes: Tensor, position: Tensor, end: int, cache: GPUCache) -> tuple[Tensor, Tensor]:
        """All codes (N, Q) of the position (1,) -> the trunk's output (N, E), logits of the first code after (N, K)."""
        prior, weights = self.prior, self.weights
        tables = torch.arange(prior.num_codebooks, device=codes.device) * prior.codebook_size
        x = F.embedding(codes + tables, weights.code_embedding).sum(1)  # (N, E)
        x = x + weights.code_position.index_select(0, position)
        hidden = torch.arange(end, device=codes.device) > position  # (L,)
        for layer, (norms, product) in enumerate(zip(weights.layers, self.products, strict=True)):
            x = x + self._attention(rms_norm(x, norms.attention_norm), layer, position, hidden, cache)
            x = x + product.mlp_out(F.gelu(product.mlp_in(rms_norm(x, norms.mlp_norm))))
        state = rms_norm(x, weights.norm)
        return state, prior.code_head.logits(state, codes[:, :0])

    def _attention(self, x: Tensor, layer: int, position: Tensor, hidden: Tensor, cache: GPUCache) -> Tensor:
        product, weights = self.products[layer], self.weights.layers[layer]
        q, k, v = rearrange(product.qkv(x), "n (three h d) -> three n h d", three=3, h=self.weights.num_heads).unbind()
        q, k = rms_norm(q, weights.query_scale), rms_norm(k, weights.key_scale)
        cache.keys[layer].index_copy_(2, position, k.unsqueeze(2))
        cache.values[layer].index_copy_(2, position, v.unsqueeze(2))
        keys, values = cache.keys[layer, :, :, : len(hidden)], cache.values[layer, :, :, : len(hidden)]

        # All queries of a prefix are one matrix against its keys, which are read once and copied never.
        prefixes, length = cache.prefix_keys.shape[1], cache.prefix_keys.shape[3]
        grouped = rearrange(q, "(r g) h d -> r h g d", r=prefixes)
        shared = grouped @ cache.prefix_keys[layer].transpose(-1, -2)  # (R, heads, G, P)
        suffix = (keys @ q.unsqueeze(-1)).squeeze(-1).masked_fill(hidden, -torch.inf)  # (N, heads, L)
        scores = torch.cat([rearrange(shared, "r h g p -> (r g) h p"), suffix], dim=-1).float()
        probabilities = (scores * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype)
        grouped = rearrange(probabilities[..., :length], "(r g) h p -> r h g p", r=prefixes)
        from_prefix = rearrange(grouped @ cache.prefix_values[layer], "r h g d -> (r g) h d")
        from_suffix = (probabilities[..., length:].unsqueeze(-2) @ values).squeeze(-2)  # (N, heads, d)
        return product.out((from_prefix + from_suffix).flatten(1))


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    return F.rms_norm(x, scale.shape, scale, eps=EPS)
