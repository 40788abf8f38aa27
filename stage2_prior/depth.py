"""The codes of one position, one after another: the depth of residual codes (Lee et al. 2022, section 3.2.2).

A trunk that runs once a position says what stands there; this head predicts its Q codes, each given the ones before it.
Deliberate difference from RQ-Transformer: where that has a second transformer over the depth, each depth here has an
MLP over the trunk's state plus the embeddings of the codes so far, which costs little beside the trunk.

Letters: Q codebooks, K codebook size, E width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DepthHead(nn.Module):
    """The first code's logits are linear in the trunk's state; with one codebook that is all."""

    def __init__(self, num_codebooks: int, codebook_size: int, dim: int) -> None:
        super().__init__()
        deeper = range(1, num_codebooks)
        self.num_codebooks = num_codebooks
        self.weight = nn.Parameter(torch.randn(codebook_size, dim) * 0.02)  # (K, E) of the first code
        self.heads = nn.ModuleList(nn.Linear(dim, codebook_size, bias=False) for _ in deeper)
        self.embeddings = nn.ModuleList(nn.Embedding(codebook_size, dim) for _ in deeper)
        self.blocks = nn.ModuleList(DepthBlock(dim) for _ in deeper)
        for layer in (*self.heads, *self.embeddings):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, state: Tensor, codes: Tensor) -> Tensor:
        """States (..., E) and their codes (..., Q) int64 -> logits (..., Q, K); logits q depend on codes before q."""
        if self.num_codebooks == 1:  # without the copy that joins the depths
            return self.logits(state, codes[..., :0]).unsqueeze(-2)
        return torch.stack([self.logits(state, codes[..., :depth]) for depth in range(self.num_codebooks)], dim=-2)

    def logits(self, state: Tensor, before: Tensor) -> Tensor:
        """States (..., E) and the q first codes of their positions (..., q) -> logits of the next code (..., K)."""
        depth = before.shape[-1]
        if depth == 0:
            return F.linear(state, self.weight)
        x = state
        for embedding, codes in zip(self.embeddings, before.unbind(-1), strict=False):
            x = x + embedding(codes)
        return self.heads[depth - 1](self.blocks[depth - 1](x))


class DepthBlock(nn.Module):
    """An MLP beside the identity, (..., E) -> (..., E) normalised."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.mlp_in = nn.Linear(dim, 2 * dim, bias=False)
        self.mlp_out = nn.Linear(2 * dim, dim, bias=False)
        self.norm_out = nn.RMSNorm(dim, eps=1e-6)
        nn.init.zeros_(self.mlp_out.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_out(x + self.mlp_out(F.gelu(self.mlp_in(self.norm(x)))))
