"""What codebooks share: nearest neighbours, the gradient that passes them, and the revival of unused codes."""

from typing import Literal, assert_never

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

MOST_DISTANCES = 2**26  # at once, 256 MiB of them; large images with large codebooks have more
Gradient = Literal["straight-through", "rotation"]  # how the decoder's gradient comes past the nearest code


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """(N, D), (K, D) -> (N,) int64: the code with the least Euclidean distance; the lowest of equals."""
    # |v - c|^2 = |v|^2 - 2 v.c + |c|^2, and |v|^2 does not change which c is nearest
    squares = codebook.square().sum(1)
    parts = vectors.split(max(1, MOST_DISTANCES // len(codebook)))
    return torch.cat([(squares - 2 * part @ codebook.T).argmin(1) for part in parts])


def most_alike(vectors: Tensor, codebook: Tensor) -> Tensor:
    """(N, D), (K, D) -> (N,) int64: the code with the largest dot product; the lowest of equals."""
    parts = vectors.split(max(1, MOST_DISTANCES // len(codebook)))
    return torch.cat([(part @ codebook.T).argmax(1) for part in parts])


def straight_through(z: Tensor, quantized: Tensor) -> Tensor:
    """The value of `quantized` with the gradient of `z` (Bengio et al. 2013)."""
    return quantized.detach() + (z - z.detach())  # z - z is exactly 0: the decoder sees what `lookup` gives


def rotation(z: Tensor, quantized: Tensor) -> Tensor:
    """The value of `quantized`, as the rotation and scaling of `z` that leads to it (Fifty et al. 2024, section 4.2).

    (B, D, h, w) both. The gradient of `quantized` is turned and scaled likewise on its way to `z`, so that its angle to
    the code becomes its angle to `z`. The turn is that of two reflections, I - 2 r r' + 2 q e' with e and q the
    directions of `z` and `quantized` and r that of e + q; it and the scale |quantized| / |z| are constants.
    """
    e, q = F.normalize(z.detach(), dim=1), F.normalize(quantized.detach(), dim=1)
    r = F.normalize(e + q, dim=1)
    scale = quantized.detach().norm(dim=1, keepdim=True) / z.detach().norm(dim=1, keepdim=True).clamp_min(1e-6)
    change = z - z.detach()  # exactly 0, and linear in z
    rotated = change - 2 * r * (r * change).sum(1, keepdim=True) + 2 * q * (e * change).sum(1, keepdim=True)
    return quantized.detach() + scale * rotated


def pass_gradient(z: Tensor, quantized: Tensor, gradient: Gradient) -> Tensor:
    """The value of `quantized`, whichever the gradient to `z`."""
    match gradient:
        case "straight-through":
            return straight_through(z, quantized)
        case "rotation":
            return rotation(z, quantized)
        case _:
            assert_never(gradient)


def sum_over_processes(tensor: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class Revival(nn.Module):
    """Finds codes that nothing has used for `patience` training steps and gives them vectors that occur.

    Dead codes and their replacements are the same on all processes: usage is summed, replacements come from process 0.
    `patience` 0 revives nothing.
    """

    unused_steps: Tensor
    started: Tensor

    def __init__(self, codebook_size: int, patience: int) -> None:
        super().__init__()
        self.patience = patience
        self.revived = torch.zeros(0, dtype=torch.int64)  # the codes that came back in the last training step
        self.register_buffer("unused_steps", torch.zeros(codebook_size, dtype=torch.int64), persistent=True)
        self.register_buffer("started", torch.zeros((), dtype=torch.bool), persistent=True)

    @torch.no_grad()
    def forward(self, used: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Usage counts (K,) over all processes, vectors (N, D) of this step -> dead codes (R,), their vectors (R, D).

        At the first step every code is dead: the codebook starts from the data. From then on codes come back in the
        order in which they died.
        """
        self.unused_steps += 1
        self.unused_steps[used > 0] = 0
        if not self.patience:
            dead = self.unused_steps[:0]
        elif not self.started:
            dead = torch.arange(len(used), device=used.device)
        else:
            dead = (self.unused_steps >= self.patience).nonzero().flatten()
        self.started.fill_(True)
        self.unused_steps[dead] = 0
        self.revived = dead
        choice = torch.randint(len(vectors), (len(dead),)).to(vectors.device)
        replacements = vectors[choice].clone()
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(replacements, src=0)
        return dead, replacements
