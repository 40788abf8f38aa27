"""Rotary positions: queries and keys are rotated by their coordinates (RoPE, Su et al. 2021, section 3.2).

With one axis the coordinate counts all positions, prefix first. With two, as for images in EVA-02 (Fang et al. 2023)
and LlamaGen (Sun et al. 2024), half the channels rotate with the row and half with the column of the code grid.

Letters: P prefix positions, S = h·w image positions, L = P + S, d channels of a head.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tessera.config import Config


class RotarySpec(Config):
    axes: Literal[1, 2] = 1
    base: float = Field(10_000.0, gt=0)
    # Which channels rotate as a pair: i and i + d / 2 (GPT-NeoX, Llama of transformers), or 2i and 2i + 1 (LlamaGen).
    pairs: Literal["halves", "interleaved"] = "halves"
    # Coordinates of the prefix. counted: p on every axis, the grid starts at P (Qwen2-VL, Wang et al. 2024).
    # unpadded: as counted, but padding has no coordinate (Janus). zeroed: queries and keys of the prefix become zeros
    # and the grid starts at 0, as LlamaGen was trained.
    prefix: Literal["counted", "unpadded", "zeroed"] = "counted"


class Rotation(NamedTuple):
    cosine: Tensor  # (n, d / 2) or (B, 1, n, d / 2), float32
    sine: Tensor


def rotation(
    spec: RotarySpec,
    prefix_length: int,
    grid: tuple[int, int],
    head_dim: int,
    first: int,
    last: int,
    device: torch.device,
    order: Tensor | None = None,
    present: Tensor | None = None,
) -> Rotation:
    """The rotations of the positions from `first` to `last`; `head_dim` must be divisible by twice the axes.

    `order` (B, S) is the permutation in which image positions are read; `present` (B, P) is False on padding.
    """
    places = torch.arange(first, last, device=device)
    if order is not None:  # (B, n): the place in raster order of what is read there
        prefix = torch.arange(prefix_length, device=device).expand(len(order), -1)
        places = torch.cat([prefix, prefix_length + order], dim=1)[:, first:last]
    image = places - prefix_length
    offset = 0 if spec.prefix == "zeroed" else prefix_length
    if spec.prefix == "unpadded" and present is not None:
        counted = F.pad(present, (0, max(0, last - prefix_length)), value=True)
        coordinates = (counted.cumsum(1) - 1).clamp_min(0)[:, first:last].unsqueeze(-1)  # (B, n, 1)
    elif spec.axes == 1:
        coordinates = (image + offset).unsqueeze(-1)
    else:
        in_grid = torch.stack([image // grid[1], image % grid[1]], dim=-1) + offset
        coordinates = torch.where((image < 0).unsqueeze(-1), (image + offset).unsqueeze(-1), in_grid)
    pairs = head_dim // 2 // spec.axes
    frequencies = spec.base ** (-torch.arange(pairs, device=device) / pairs)
    angles = (coordinates.unsqueeze(-1) * frequencies).flatten(-2)  # (..., n, d / 2)
    cosine, sine = angles.cos(), angles.sin()
    if spec.prefix == "zeroed":
        outside = (image < 0).unsqueeze(-1)
        cosine, sine = cosine.masked_fill(outside, 0.0), sine.masked_fill(outside, 0.0)
    if cosine.ndim == 3:  # each sequence its own, for all heads
        cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    return Rotation(cosine, sine)


def rotate(x: Tensor, by: Rotation, pairs: Literal["halves", "interleaved"] = "halves") -> Tensor:
    """(B, heads, n, d), each pair of channels rotated in float32, in the precision of `x`."""
    if pairs == "halves":
        first, second = x.float().chunk(2, dim=-1)
    else:
        first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = first * by.cosine - second * by.sine, second * by.cosine + first * by.sine
    together = torch.cat(rotated, dim=-1) if pairs == "halves" else torch.stack(rotated, dim=-1).flatten(-2)
    return together.to(x.dtype)
