"""Towers of a CLIP: a ViT or a ResNet for images, and the transformer that reads texts, too.

The ViT is Dosovitskiy et al. 2021; the ResNet is OpenAI's kind (Radford et al. 2021, section 2.4): a stem of three
convolutions, an average pool in place of each stride, attention in place of the last pool. Parameters have open_clip's
names and its initialisation, drawn in its order, so that a seed gives both the same model.

Letters: N images, S side of an image, L tokens, W width, E embedding width.
"""

from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from tessera.config import Config

Count = Annotated[int, Field(gt=0)]


class Exact(Config):
    """Takes no "12" for 12, because open_clip does not either. Defaults of the subclasses are open_clip's."""

    model_config = ConfigDict(strict=True)


class ViTConfig(Exact):
    image_size: Count = 224
    patch_size: Count = 16
    width: Count = 768
    layers: Count = 12
    head_width: Count = 64
    mlp_ratio: float = 4.0
    no_ln_pre: bool = False  # no norm before the first block
    final_ln_after_pool: bool = False  # normalise the pooled token, not all tokens
    pool_type: Literal["tok", "avg"] = "tok"  # the class token, or the mean of all others

    @model_validator(mode="after")
    def _divisible(self) -> "ViTConfig":
        if self.width < self.head_width or self.width % self.heads or self.patch_size > self.image_size:
            raise ValueError("width must be whole heads, and image_size at least a patch")
        return self

    @property
    def heads(self) -> int:
        return self.width // self.head_width


class ResNetConfig(Exact):
    image_size: Annotated[int, Field(ge=32)] = 224
    width: Annotated[int, Field(ge=2)] = 768  # of the stem; the stages have 4, 8, 16 and 32 times as many channels
    layers: list[Count] = Field(min_length=4, max_length=4)  # blocks of each stage
    head_width: Count = 64
    patch_size: None = None  # open_clip's own configs have it

    @model_validator(mode="after")
    def _divisible(self) -> "ResNetConfig":
        if 32 * self.width < self.head_width or 32 * self.width % self.heads:
            raise ValueError("32 times width must be whole heads")
        return self

    @property
    def heads(self) -> int:
        return 32 * self.width // self.head_width


class TextConfig(Exact):
    context_length: Count = 77
    vocab_size: Count = 49408
    hf_tokenizer_name: str | None = None
    width: Count = 512
    heads: Count = 8
    layers: Count = 12
    mlp_ratio: float = 4.0
    pad_id: int = 0  # not read: padding follows the pooled token, which does not attend to it
    eos_id: int = 2
    no_causal_mask: bool = False  # every token attends to all
    pool_type: Literal["first", "last", "argmax", "eos"] = "argmax"  # argmax: CLIP's end token has the highest id

    @model_validator(mode="after")
    def _divisible(self) -> "TextConfig":
        if self.width % self.heads:
            raise ValueError("width must be whole heads")
        return self


# Image towers ---------------------------------------------------------------------------------------------------------


class ViT(nn.Module):
    def __init__(self, config: ViTConfig, embed_dim: int, quick_gelu: bool) -> None:
        super().__init__()
        width, side = config.width, config.image_size // config.patch_size
        self.config = config
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = parameter(width, std=width**-0.5)
        self.positional_embedding = parameter(side * side + 1, width, std=width**-0.5)
        self.ln_pre = nn.Identity() if config.no_ln_pre else nn.LayerNorm(width)
        self.transformer = Transformer(config, quick_gelu)
        self.ln_post = nn.LayerNorm(width)
        self.proj = parameter(width, embed_dim, std=width**-0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, E)."""
        x = self.conv1(pixels).flatten(2).transpose(1, 2)  # (N, L - 1, W)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x), causal=False)
        if not self.config.final_ln_after_pool:
            x = self.ln_post(x)
        x = x[:, 0] if self.config.pool_type == "tok" else x[:, 1:].mean(1)
        if self.config.final_ln_after_pool:
            x = self.ln_post(x)
        return x @ self.proj


class ResNet(nn.Module):
    def __init__(self, config: ResNetConfig, embed_dim: int) -> None:
        super().__init__()
        width = config.width
        self.conv1, self.bn1 = _convolution(3, width // 2, 3, stride=2), nn.BatchNorm2d(width // 2)
        self.conv2, self.bn2 = _convolution(width // 2, width // 2, 3), nn.BatchNorm2d(width // 2)
        self.conv3, self.bn3 = _convolution(width // 2, width, 3), nn.BatchNorm2d(width)
        stages, channels = [], width
        for stage, blocks in enumerate(config.layers):
            inner, stride = width * 2**stage, 1 if stage == 0 else 2
            first = ResNetBlock(channels, inner, stride)
            channels = 4 * inner
            stages.append(nn.Sequential(first, *(ResNetBlock(channels, inner) for _ in range(blocks - 1))))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.attnpool = AttentionPool(channels, config.image_size // 32, config.heads, embed_dim)

    def stem(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, width, S / 4, S / 4)."""
        x = F.relu(self.bn1(self.conv1(pixels)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, E)."""
        x = self.stem(pixels)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        embedded: Tensor = self.attnpool(x)
        return embedded


class ResNetBlock(nn.Module):
    """He et al. 2015, figure 5 right, with an average pool in place of its stride; starts as the identity."""

    def __init__(self, channels: int, inner: int, stride: int = 1) -> None:
        super().__init__()
        self.stride, out = stride, 4 * inner
        self.conv1, self.bn1 = _convolution(channels, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = _convolution(inner, inner, 3), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = _convolution(inner, out, 1), nn.BatchNorm2d(out)
        nn.init.zeros_(self.bn3.weight)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential(_convolution(channels, out, 1), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self._pool(F.relu(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        if self.downsample is not None:
            x = self.downsample(self._pool(x))
        return F.relu(y + x)

    def _pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.stride) if self.stride > 1 else x


class AttentionPool(nn.Module):
    """Attention of one query, the mean of all positions, to that mean and all positions."""

    def __init__(self, channels: int, side: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = parameter(side * side + 1, channels, std=channels**-0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
        self.c_proj = nn.Linear(channels, embed_dim)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(projection.weight, std=channels**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, side, side) -> (N, E)."""
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding  # (N, L, channels)
        x = _attend(self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x), self.heads, causal=False)
        embedded: Tensor = self.c_proj(x[:, 0])
        return embedded


# Transformer ----------------------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    def __init__(self, config: ViTConfig | TextConfig, quick_gelu: bool) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(config, quick_gelu) for _ in range(config.layers))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """(B, L, W) -> (B, L, W)."""
        for block in self.resblocks:
            x = block(x, causal)
        return x


class Block(nn.Module):
    def __init__(self, config: ViTConfig | TextConfig, quick_gelu: bool) -> None:
        super().__init__()
        width, inner = config.width, int(config.width * config.mlp_ratio)
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, config.heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, inner), "c_proj": nn.Linear(inner, width)})
        self.activation = _quick_gelu if quick_gelu else F.gelu

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp["c_proj"](self.activation(self.mlp["c_fc"](self.ln_2(x))))


class Attention(nn.Module):
    """Parameters, and their initialisation, of `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = parameter(3 * width, width)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """(B, L, W) -> (B, L, W)."""
        queries, keys, values = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        attended: Tensor = self.out_proj(_attend(queries, keys, values, self.heads, causal))
        return attended


def _attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int, causal: bool) -> Tensor:
    """(B, l, W) and twice (B, L, W) -> (B, l, W)."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (queries, keys, values))  # (B, heads, L, .)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _convolution(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, stride=stride, padding=kernel // 2, bias=False)


def parameter(*shape: int, std: float | None = None) -> nn.Parameter:
    """Normally distributed, or not yet initialised."""
    weight = nn.Parameter(torch.empty(shape))
    return weight if std is None else nn.init.normal_(weight, std=std)  # type: ignore[return-value]
