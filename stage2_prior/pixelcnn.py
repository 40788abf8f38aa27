"""The gated PixelCNN over codes (van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders").

Two stacks of convolutions without a blind spot: the vertical one sees all rows above a position, the horizontal one
what stands left of it and, through a 1x1 convolution in every layer, the vertical one (figure 2). A layer's output is
tanh(a + u) * sigmoid(b + v), where a and b are its convolution's and u and v the condition's (equation 4; equation 5
where the condition is a map). What the paper masks, here is shifted and padded: the vertical stack starts from the grid
moved down by a row, the horizontal one from it moved right by a column.

Drawing computes each position once: a row of the vertical stack when the row before it is whole, then one column of the
horizontal stack after the other.

Deliberate differences: a position's Q codes are read as the sum of their embeddings and drawn by `depth.py`; a text is
read by a few blocks of attention and averaged; the vertical stack has residual connections too.

Letters: B batch, N sequences, P prefix, Q codebooks, h w code grid, T = Q·h·w, K codebook size, E width, m how many
positions a layer sees to each side.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from stage2_prior.base import Cache
from stage2_prior.conditions import ConditionedConfig, ConditionedPrior
from stage2_prior.decoder import Block, DecoderSpec, View
from stage2_prior.depth import DepthHead
from tessera.config import Config
from tessera.text import PAD, TextTokenizer


class PixelCNNSize(Config):
    """What a recipe chooses about the model; the rest follows from the codes and the condition."""

    type: Literal["pixelcnn"] = "pixelcnn"
    text_length: int = Field(64, ge=2)  # P of a text, <start> included; longer captions are cut off in training
    dim: int = Field(128, ge=8)  # E, feature maps
    depth: int = Field(12, ge=1)  # gated layers
    kernel_size: int = Field(5, ge=3)  # 2m + 1
    text_depth: int = Field(2, ge=0)  # attention blocks that read a text
    num_heads: int = Field(4, ge=1)  # of these
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> "PixelCNNSize":
        if self.dim % self.num_heads:
            raise ValueError(f"dim must be divisible by num_heads, got {self.dim} and {self.num_heads}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
        return self


class PixelCNNConfig(ConditionedConfig, PixelCNNSize):
    type: Literal["pixelcnn"] = "pixelcnn"


class GridCache(Cache):
    """The rows and columns computed so far, of every layer's input, and where drawing stands."""

    def __init__(self, codes: Tensor, vertical: Tensor, links: Tensor, horizontal: Tensor, conditions: Tensor) -> None:
        self.codes = codes  # (N, E, h, w), embeddings of what was drawn
        self.vertical = vertical  # (depth, N, E, m + h, w), m rows of zeros above
        self.links = links  # (depth, N, 2E, w), what the row under way gets from the vertical stack
        self.horizontal = horizontal  # (depth, N, E, m + w), of the row under way, m columns of zeros to its left
        self.conditions = conditions  # (depth, N, 4E, h or 1, w or 1)
        self.position = 0  # that is drawn next
        self.state = codes[:, :, 0, 0]  # (N, E), the trunk's output for it
        self.drawn = torch.empty(0)  # (N, q), its codes so far

    def repeat(self, rows: Tensor) -> "GridCache":
        cache = GridCache(
            self.codes[rows],
            self.vertical[:, rows],
            self.links[:, rows],
            self.horizontal[:, rows],
            self.conditions[:, rows],
        )
        cache.position, cache.state, cache.drawn = self.position, self.state[rows], self.drawn[rows]
        return cache


class PixelCNNPrior(ConditionedPrior):
    config: PixelCNNConfig

    def __init__(self, config: PixelCNNConfig, text_tokenizer: TextTokenizer | None = None) -> None:
        super().__init__(config, text_tokenizer)
        self.read_condition = ConditionReader(config)
        self.code_embedding = nn.Embedding(self.num_codebooks * config.codebook_size, config.dim)
        nn.init.normal_(self.code_embedding.weight, std=config.dim**-0.5)
        self.layers = nn.ModuleList(GatedLayer(config) for _ in range(config.depth))
        self.out = nn.Conv2d(config.dim, config.dim, 1)
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.code_head = DepthHead(self.num_codebooks, config.codebook_size, config.dim)

    # Training --------------------------------------------------------------------------------------------------------

    def forward(self, prefix: Tensor, codes: Tensor) -> Tensor:
        _, height, width = self.code_shape
        positions = rearrange(codes, "b (s q) -> b s q", q=self.num_codebooks)
        grid = rearrange(self._embed(positions), "b (h w) e -> b e h w", h=height)
        vertical = F.pad(grid, (0, 0, 1, 0))[:, :, :height]  # moved down by a row
        horizontal = F.pad(grid, (1, 0))[..., :width]  # moved right by a column
        condition = self.read_condition(prefix)
        for layer in self._layers():
            vertical, horizontal = layer(vertical, horizontal, layer.condition(condition))
        state = rearrange(self._head(horizontal), "b e h w -> b (h w) e")
        return self.code_head(state, positions).flatten(1, 2)

    def _layers(self) -> Iterator["GatedLayer"]:
        return (layer for layer in self.layers if isinstance(layer, GatedLayer))

    def _embed(self, codes: Tensor) -> Tensor:
        """All Q codes of positions (..., Q) -> (..., E)."""
        table = torch.arange(self.num_codebooks, device=codes.device) * self.codebook_size
        return self.code_embedding(codes + table).sum(-2)

    def _head(self, horizontal: Tensor) -> Tensor:
        """What the horizontal stack ends with, (B, E, h, w) -> states (B, E, h, w)."""
        x = F.relu(self.out(F.relu(horizontal)))
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)

    # Sampling --------------------------------------------------------------------------------------------------------

    def prefill(self, prefix: Tensor, length: int) -> tuple[Tensor, GridCache]:
        config, rows = self.config, len(prefix)
        (_, height, width), side = self.code_shape, config.kernel_size // 2
        condition = self.read_condition(prefix)
        empty = self.code_embedding.weight.new_zeros
        cache = GridCache(
            empty(rows, config.dim, height, width),
            empty(config.depth, rows, config.dim, side + height, width),
            empty(config.depth, rows, 2 * config.dim, width),
            empty(config.depth, rows, config.dim, side + width),
            torch.stack([layer.condition(condition) for layer in self._layers()]),
        )
        return self._advance(cache, prefix[:, :0]), cache

    def step(self, codes: Tensor, cache: Cache) -> Tensor:
        assert isinstance(cache, GridCache)
        cache.drawn = torch.cat([cache.drawn, codes.unsqueeze(1)], dim=1)
        if cache.drawn.shape[1] < self.num_codebooks:
            return self.code_head.logits(cache.state, cache.drawn)
        row, column = divmod(cache.position, self.code_shape[2])
        cache.codes[:, :, row, column] = self._embed(cache.drawn)
        cache.position += 1
        return self._advance(cache, cache.drawn[:, :0])

    def _advance(self, cache: GridCache, drawn: Tensor) -> Tensor:
        """Computes the position that is drawn next; returns the logits of its first code (N, K)."""
        row, column = divmod(cache.position, self.code_shape[2])
        side = self.config.kernel_size // 2
        if column == 0:
            self._advance_row(cache, row)
        x = cache.codes[:, :, row, column - 1] if column > 0 else torch.zeros_like(cache.codes[:, :, 0, 0])  # (N, E)
        for i, layer in enumerate(self._layers()):
            cache.horizontal[i, :, :, side + column] = x
            window = cache.horizontal[i, :, :, None, column : column + side + 1]
            condition = at(cache.conditions[i], row, column)
            x = layer.right(x[:, :, None, None], window, cache.links[i, :, :, None, column : column + 1], condition)
            x = x[:, :, 0, 0]
        cache.state = self._head(x[:, :, None, None])[:, :, 0, 0]
        cache.drawn = drawn
        return self.code_head.logits(cache.state, drawn)

    def _advance_row(self, cache: GridCache, row: int) -> None:
        """Computes the vertical stack of a row, of which all that is above it has been drawn."""
        side = self.config.kernel_size // 2
        x = cache.codes[:, :, row - 1 : row] if row > 0 else torch.zeros_like(cache.codes[:, :, :1])  # (N, E, 1, w)
        for i, layer in enumerate(self._layers()):
            cache.vertical[i, :, :, side + row] = x[:, :, 0]
            window = F.pad(cache.vertical[i, :, :, row : row + side + 1], (side, side))
            x, link = layer.down(x, window, at(cache.conditions[i], row))
            cache.links[i] = link[:, :, 0]

    def cache_numbers(self) -> int:
        config, side = self.config, self.config.kernel_size // 2
        _, height, width = self.code_shape
        condition = 4 * (height * width if self.condition == "segmentation" else 1)
        layer = (side + height) * width + 2 * width + side + width + condition
        return config.dim * (height * width + config.depth * layer)


class GatedLayer(nn.Module):
    """One layer of both stacks (figure 2)."""

    def __init__(self, config: PixelCNNConfig) -> None:
        super().__init__()
        dim, side = config.dim, config.kernel_size // 2
        self.side = side
        self.vertical = nn.Conv2d(dim, 2 * dim, (side + 1, 2 * side + 1))
        self.horizontal = nn.Conv2d(dim, 2 * dim, (1, side + 1))
        self.link = nn.Conv2d(2 * dim, 2 * dim, 1)  # from the vertical stack to the horizontal one
        self.out = nn.Conv2d(dim, dim, 1)
        self.condition = nn.Conv2d(dim, 4 * dim, 1, bias=False)  # V of both stacks' gates
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, vertical: Tensor, horizontal: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Both stacks (B, E, h, w), and the condition (B, 4E, h or 1, w or 1) -> both stacks."""
        below, link = self.down(vertical, F.pad(vertical, (self.side, self.side, self.side, 0)), condition)
        return below, self.right(horizontal, F.pad(horizontal, (self.side, 0)), link, condition)

    def down(self, x: Tensor, seen: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (B, E, n, w) and what they see (B, E, m + n, m + w + m) -> (B, E, n, w), and the link (B, 2E, n, w)."""
        mixed = self.vertical(seen)
        return x + gate(mixed + condition.chunk(2, dim=1)[0]), self.link(mixed)

    def right(self, x: Tensor, seen: Tensor, link: Tensor, condition: Tensor) -> Tensor:
        """Columns (B, E, h, n) and all that they see (B, E, h, m + n) -> (B, E, h, n)."""
        mixed = self.horizontal(seen) + link + condition.chunk(2, dim=1)[1]
        return x + self.dropout(self.out(gate(mixed)))


class ConditionReader(nn.Module):
    """A prefix (B, P) -> features (B, E, 1, 1), or (B, E, h, w) where the condition is a map (section 2.3)."""

    def __init__(self, config: PixelCNNConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.prefix_vocab_size, config.dim)
        self.text_position = nn.Parameter(
            torch.zeros(config.text_length if config.condition == "text" else 0, config.dim)
        )
        text_depth = config.text_depth if config.condition == "text" else 0
        spec = DecoderSpec(
            dim=config.dim,
            depth=max(1, text_depth),
            num_heads=config.num_heads,
            mlp_dim=4 * config.dim,
            prefix_length=config.prefix_length,
            grid=config.code_shape[1:],
        )
        self.blocks = nn.ModuleList(Block(spec) for _ in range(text_depth))  # that attend in both directions
        map_depth = 2 if config.condition == "segmentation" else 0  # each sees its neighbours, on all sides
        self.convolutions = nn.ModuleList(nn.Conv2d(config.dim, config.dim, 3, padding=1) for _ in range(map_depth))

    def forward(self, prefix: Tensor) -> Tensor:
        x = self.embedding(prefix)  # (B, P, E)
        match self.config.condition:
            case "text":
                present = prefix != PAD
                x = x + self.text_position
                for block in self.blocks:
                    x = block(x, View(mask=present[:, None, None]))
                x = (x * present.unsqueeze(-1)).sum(1) / present.sum(1, keepdim=True)
                return x[:, :, None, None]
            case "segmentation":
                assert self.config.segmentation_code_shape is not None
                codebooks, height, _ = self.config.segmentation_code_shape
                x = rearrange(x, "b (h w q) e -> b q e h w", q=codebooks, h=height).sum(1)
                x = F.interpolate(x, size=self.config.code_shape[1:], mode="nearest")
                for convolution in self.convolutions:
                    x = x + convolution(F.gelu(x))
                return x
            case _:
                return rearrange(x, "b 1 e -> b e 1 1")


def gate(x: Tensor) -> Tensor:
    """(B, 2E, h, w) -> (B, E, h, w) (equation 2)."""
    values, gates = x.chunk(2, dim=1)
    return values.tanh() * gates.sigmoid()


def at(condition: Tensor, row: int, column: int | None = None) -> Tensor:
    """One row or position of a condition that is a map, (N, C, 1, w or 1); what is no map is the same everywhere."""
    if condition.shape[2:] == (1, 1):
        return condition
    rows = condition[:, :, row : row + 1]
    return rows if column is None else rows[..., column : column + 1]
