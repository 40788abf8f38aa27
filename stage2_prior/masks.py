"""Which positions attend to which: the one place where masks are made.

Patterns of sparse attention (Ramesh et al. 2021, appendix B.1; ruDALL-E's square). A position attends to the whole
prefix before it, whatever the pattern, and to itself. Most patterns are sets of distances back along the codes in
raster order, so all but the column wrap around at the edges of the grid (figure 11):

    row              the last w + 1 positions, up to the one straight above
    column           the positions above, in the same column
    convolution      a k x k window around the position, as far as it has been read
    square           a k x k window that is cut at the edges of the grid
    wrapped-square   the same, continued at the opposite edges

Letters: P prefix positions, S = h·w image positions, L = P + S, k window, n queries, m keys.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

Pattern = Literal["full", "row", "column", "convolution", "square", "wrapped-square"]
TrainedPattern = Literal["full", "row", "column", "convolution"]  # what a recipe can ask for


def arrangement(patterns: Sequence[TrainedPattern] | Literal["dalle"], depth: int) -> tuple[TrainedPattern, ...]:
    """The pattern of each layer: `patterns` over and over, or DALL·E's arrangement.

    That is row, column, row, row over and over, and a convolution in the last layer.
    """
    if patterns == "dalle":
        return (*arrangement(("row", "column", "row", "row"), depth - 1), "convolution")
    return tuple(patterns[layer % len(patterns)] for layer in range(depth))


def visible(
    pattern: Pattern, queries: Tensor, keys: Tensor, prefix_length: int, grid: tuple[int, int], window: int
) -> Tensor:
    """Positions (n,) and (m,) int64 in [0, L) -> (n, m) bool, True where the query attends to the key."""
    back = queries.unsqueeze(1) - keys
    if pattern in ("square", "wrapped-square"):
        near = _near_in_grid(queries - prefix_length, keys - prefix_length, grid, window // 2, pattern != "square")
        near = near | (back == 0)
    else:
        near = distances(pattern, grid, window, queries.device)[back.clamp(0, grid[0] * grid[1] - 1)]
    return (back >= 0) & (near | (keys < prefix_length))


def distances(pattern: Pattern, grid: tuple[int, int], window: int, device: torch.device) -> Tensor:
    """(S,) bool, True at d where a position attends to the one d positions before it."""
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
            reach = window // 2
            rows = torch.arange(reach + 1, device=device) * width
            return ((back - rows.unsqueeze(1)).abs() <= reach).any(0)
        case "square" | "wrapped-square":
            raise ValueError(f"a {pattern} is no set of distances")
        case _:
            assert_never(pattern)


def _near_in_grid(queries: Tensor, keys: Tensor, grid: tuple[int, int], reach: int, wraps: bool) -> Tensor:
    """Image positions (n,) and (m,) -> (n, m) bool, True where rows and columns are at most `reach` apart."""
    near = torch.ones(len(queries), len(keys), dtype=torch.bool, device=queries.device)
    for query, key, size in (
        (queries // grid[1], keys // grid[1], grid[0]),
        (queries % grid[1], keys % grid[1], grid[1]),
    ):
        apart = (query.unsqueeze(1) - key).abs()
        near &= (torch.minimum(apart, size - apart) if wraps else apart) <= reach
    return near


@lru_cache(maxsize=64)
def pattern_mask(
    pattern: Pattern, length: int, prefix_length: int, grid: tuple[int, int], window: int, device: torch.device
) -> Tensor:
    """`visible` for all of the first `length` positions, (length, length); made once."""
    with torch.inference_mode(False):  # else autograd could not keep it for the backward pass
        positions = torch.arange(length, device=device)
        return visible(pattern, positions, positions, prefix_length, grid, window)


def with_padding(mask: Tensor | None, first: int, last: int, present: Tensor) -> Tensor:
    """A mask for the queries from `first` to `last` over `last` keys that hides padding: (B, 1, n, last).

    `mask` is (n, last), None for causal; `present` (B, P) is False where the prefix is padded. A padded position still
    attends to itself, because a softmax over nothing is not defined.
    """
    queries = torch.arange(first, last, device=present.device).unsqueeze(1)
    keys = torch.arange(last, device=present.device)
    mask = keys <= queries if mask is None else mask
    not_padding = F.pad(present[:, :last], (0, max(0, last - present.shape[1])), value=True)  # (B, last)
    return mask & not_padding[:, None, None] | (keys == queries)


def with_look_ahead(mask: Tensor | None, last: int, look_ahead: int, device: torch.device) -> Tensor:
    """A mask for all of the first `last` positions in which the first `look_ahead` attend to each other both ways."""
    if mask is None:
        mask = torch.ones(last, last, dtype=torch.bool, device=device).tril()
    both = torch.arange(last, device=device) < look_ahead
    return mask | (both.unsqueeze(1) & both)
