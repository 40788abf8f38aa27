"""The arrays of a GPT prior that engines compute with; no other file of the engines knows where the prior keeps them.

Letters: E width, d width of a head, H hidden width of the MLP, P prefix, S image positions, Q codebooks, K codebook
size, V text vocabulary.
"""

from typing import NamedTuple

from torch import Tensor

from stage2_prior.decoder import Block
from stage2_prior.gpt import GPTPrior

EPS = 1e-6  # of the norms


class LayerWeights(NamedTuple):
    """A pre-norm block."""

    attention_norm: Tensor  # (E,)
    qkv: Tensor  # (3E, E)
    query_scale: Tensor  # (d,)
    key_scale: Tensor  # (d,)
    out: Tensor  # (E, E)
    mlp_norm: Tensor  # (E,)
    mlp_in: Tensor  # (H, E)
    mlp_out: Tensor  # (E, H)


class DepthWeights(NamedTuple):
    """One more code of a position, see `stage2_prior/depth.py`."""

    embedding: Tensor  # (K, E), of the code before
    norm: Tensor  # (E,)
    mlp_in: Tensor  # (2E, E)
    mlp_out: Tensor  # (E, 2E)
    norm_out: Tensor  # (E,)
    head: Tensor  # (K, E)


class Weights(NamedTuple):
    text_embedding: Tensor  # (V, E)
    text_position: Tensor  # (P, E)
    code_embedding: Tensor  # (Q·K, E), each codebook its own rows
    code_position: Tensor  # (S, E)
    layers: list[LayerWeights]
    norm: Tensor  # (E,)
    head: Tensor  # (K, E), of a position's first code
    depths: list[DepthWeights]  # of its other Q - 1 codes

    @property
    def num_heads(self) -> int:
        return len(self.norm) // len(self.layers[0].query_scale)


def read_weights(prior: GPTPrior) -> Weights:
    """The prior's weights themselves, not copies, except for `code_position`, which is a sum."""
    head, position = prior.code_head, prior.row_position + prior.column_position  # (h, w, E)
    depths = zip(head.embeddings, head.blocks, head.heads, strict=True)
    return Weights(
        prior.text_embedding.weight,
        prior.text_position,
        prior.code_embedding.weight,
        position.detach().flatten(0, 1),
        [_layer(block) for block in prior.decoder.blocks if isinstance(block, Block)],
        prior.decoder.norm.get_parameter("weight"),
        head.weight,
        [
            DepthWeights(
                embedding.get_parameter("weight"),
                block.get_parameter("norm.weight"),
                block.get_parameter("mlp_in.weight"),
                block.get_parameter("mlp_out.weight"),
                block.get_parameter("norm_out.weight"),
                last.get_parameter("weight"),
            )
            for embedding, block, last in depths
        ],
    )


def _layer(block: Block) -> LayerWeights:
    attention = block.attention
    return LayerWeights(
        block.attention_norm.get_parameter("weight"),
        attention.qkv.weight,
        attention.query_scale,
        attention.key_scale,
        attention.out.weight,
        block.mlp_norm.get_parameter("weight"),
        block.mlp_in.weight,
        block.mlp_out.weight,
    )
