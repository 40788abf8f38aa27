"""Vector quantization with a codebook of moving averages: van den Oord et al. 2017, appendix A.1."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from stage1_tokenizer.bottlenecks.base import Bottleneck, Bottlenecked
from stage1_tokenizer.bottlenecks.codebook import Gradient, Revival, nearest, pass_gradient, sum_over_processes


class EMAVectorQuantizer(Bottleneck):
    """Each code is the running mean of the encoder outputs that chose it; no gradient reaches the codebook."""

    codebook_size: int
    num_codebooks = 1
    codebook: Tensor  # (K, D)
    counts: Tensor  # (K,) running number of vectors that chose a code, a step
    sums: Tensor  # (K, D) running sum of them

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        beta: float,
        decay: float,
        patience: int,
        gradient: Gradient = "straight-through",
    ) -> None:
        super().__init__()
        self.codebook_size, self.beta, self.decay, self.gradient = codebook_size, beta, decay, gradient
        codebook = torch.randn(codebook_size, dim)
        self.register_buffer("codebook", codebook)
        self.register_buffer("counts", torch.ones(codebook_size))
        self.register_buffer("sums", codebook.clone())
        self.revival = Revival(codebook_size, patience)

    def forward(self, z: Tensor) -> Bottlenecked:
        vectors = rearrange(z.detach(), "b d h w -> (b h w) d")
        flat = nearest(vectors, self.codebook)  # (N,)
        codes = rearrange(flat, "(b h w) -> b 1 h w", h=z.shape[2], w=z.shape[3])
        quantized = self.lookup(codes)
        if self.training:  # after the lookup: the decoder sees the codes of this step as they were
            self._follow(vectors, flat)
        loss = self.beta * F.mse_loss(z, quantized)
        return Bottlenecked(pass_gradient(z, quantized, self.gradient), codes, loss)

    def lookup(self, codes: Tensor) -> Tensor:
        return rearrange(self.codebook[codes[:, 0]], "b h w d -> b d h w")

    @torch.no_grad()
    def _follow(self, vectors: Tensor, flat: Tensor) -> None:
        used = flat.bincount(minlength=self.codebook_size)
        sums = torch.zeros_like(self.sums).index_add_(0, flat, vectors)
        used, sums = sum_over_processes(used), sum_over_processes(sums)
        self.counts.lerp_(used.to(self.counts), 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        dead, replacements = self.revival(used, vectors)
        self.counts[dead] = 1.0
        self.sums[dead] = replacements
        self.codebook.copy_(self.sums / self.counts.clamp_min(1e-6).unsqueeze(1))
