"""Rotary positions: queries and keys are turned by their coordinates (RoPE, Su et al. 2021, section 3.2).

With one axis the coordinate counts all positions, text first. With two, as for pictures in EVA-02 (Fang et al. 2023)
and LlamaGen (Sun et al. 2024), half the channels turn with the row and half with the column. Deliberate difference from
LlamaGen, where the condition has no positions: text position p has p on both axes (Qwen2-VL, Wang et al. 2024), and the
code grid starts at (P, P).

Letters: P text positions, S = h·w image positions, L = P + S, d channels of a head.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Axes = Literal[1, 2]


class Rotation(NamedTuple):
    cosine: Tensor  # (L, d / 2) or (B, 1, L, d / 2)
    sine: Tensor

    def slice(self, first: int, last: int) -> "Rotation":
        """The rotations of a table at positions from `first` to `last`."""
        return Rotation(self.cosine[first:last], self.sine[first:last])

    def at(self, positions: Tensor) -> "Rotation":
        """The rotations of a table at positions (B, n) in [0, L), each row its own."""
        return Rotation(self.cosine[positions].unsqueeze(1), self.sine[positions].unsqueeze(1))


def rotation(axes: Axes, text_length: int, grid: tuple[int, int], head_dim: int, device: torch.device) -> Rotation:
    """The rotations of all L positions; `head_dim` must be divisible by twice the axes."""
    height, width = grid
    text = torch.arange(text_length, device=device)
    codes = torch.arange(height * width, device=device)
    if axes == 1:
        coordinates = torch.cat([text, text_length + codes]).unsqueeze(1)  # (L, 1)
    else:
        image = torch.stack([codes // width, codes % width], dim=1)
        coordinates = torch.cat([text.unsqueeze(1).expand(-1, 2), text_length + image])  # (L, 2)
    pairs = head_dim // 2 // axes
    frequencies = 10_000 ** (-torch.arange(pairs, device=device) / pairs)
    angles = (coordinates.unsqueeze(2) * frequencies).flatten(1)  # (L, d / 2)
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """(B, heads, n, d) with channel i and i + d / 2 turned as a pair."""
    first, second = x.chunk(2, dim=-1)
    cosine, sine = by.cosine.to(x.dtype), by.sine.to(x.dtype)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
