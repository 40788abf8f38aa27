"""Which codes a position sees: full, row, column and convolutional attention (Ramesh et al. 2021, appendix B.1).

A position sees all text before it, whatever the pattern, and itself. Every pattern is a set of distances back along the
codes as they are read, row after row, so all but the column wrap around at the edges of the picture (figure 11):

    row          the last w + 1 positions, up to the one straight above
    column       the positions above, in the same column
    convolution  a k x k window around the position, as far as it has been read

Letters: P text positions, S = h·w image positions, L = P + S, w width of the code grid, k kernel.
"""

from collections.abc import Sequence
from typing import Literal, assert_never

import torch
from torch import Tensor

Pattern = Literal["full", "row", "column", "convolution"]


def arrangement(patterns: Sequence[Pattern] | Literal["dalle"], depth: int) -> tuple[Pattern, ...]:
    """The pattern of each layer: `patterns` over and over, or DALL·E's own arrangement.

    That is row, column, row, row over and over, and a convolution in the last layer.
    """
    if patterns == "dalle":
        return (*arrangement(("row", "column", "row", "row"), depth - 1), "convolution")
    return tuple(patterns[layer % len(patterns)] for layer in range(depth))


def visible(
    pattern: Pattern, queries: Tensor, keys: Tensor, text_length: int, grid: tuple[int, int], kernel: int
) -> Tensor:
    """Positions (n,) and (m,) int64 in [0, L) -> (n, m) bool, True where the query sees the key."""
    back = queries.unsqueeze(1) - keys
    seen = distances(pattern, grid, kernel, queries.device)[back.clamp(0, grid[0] * grid[1] - 1)]
    return (back >= 0) & (seen | (keys < text_length))


def distances(pattern: Pattern, grid: tuple[int, int], kernel: int, device: torch.device) -> Tensor:
    """(S,) bool, True at d where a position sees the one d positions before it."""
    height, width = grid
    back = torch.arange(height * width, device=device)
    match pattern:
        case "full":
            return back >= 0
        case "row":
            return back <= width
        case "column":
            return back % width == 0
        case "convolution":
            reach = kernel // 2
            rows = torch.arange(reach + 1, device=device) * width
            return ((back - rows.unsqueeze(1)).abs() <= reach).any(0)
        case _:
            assert_never(pattern)
