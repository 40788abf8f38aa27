"""CLIP: images and texts embedded into one space (Radford et al. 2021, section 2.3 and figure 3).

Built, initialised and named as open_clip does it (equal to 1e-5, also gradients), without the seconds that importing
open_clip takes. `CLIPConfig` accepts an open_clip model config only when every key of it is understood; models of other
configs are built by open_clip itself (`foreign.py`).

Letters: N images, S side of an image, M texts, C context length, W width, E embedding width.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from tessera.clip.towers import Count, Exact, ResNet, ResNetConfig, TextConfig, Transformer, ViT, ViTConfig, parameter


class CLIPConfig(Exact):
    """`model_cfg` of `open_clip_config.json`."""

    embed_dim: Count
    vision_cfg: ViTConfig | ResNetConfig
    text_cfg: TextConfig
    quick_gelu: bool = False  # OpenAI's approximation of GELU; a ResNet tower has none

    @classmethod
    def known(cls, model_cfg: dict[str, Any]) -> "CLIPConfig | None":
        """An open_clip model config, None where it asks for anything that `CLIP` cannot build."""
        try:
            return cls.model_validate(model_cfg)
        except ValidationError:
            return None


class Embeddings(NamedTuple):
    images: Tensor  # (N, E) of length 1
    texts: Tensor  # (M, E) of length 1
    scale: Tensor  # scalar: what the contrastive loss multiplies cosines by


class CLIP(nn.Module):
    """Parameters have open_clip's names: the image tower is `visual`, the text tower has no prefix."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        vision, text = config.vision_cfg, config.text_cfg
        self.text_config = text
        self.visual: ViT | ResNet
        if isinstance(vision, ViTConfig):
            self.visual = ViT(vision, config.embed_dim, config.quick_gelu)
        else:
            self.visual = ResNet(vision, config.embed_dim)
        # Registered in open_clip's order, because optimizer states in checkpoints go by it; drawn in its order, too.
        token_embedding = nn.Embedding(text.vocab_size, text.width)
        self.positional_embedding = parameter(text.context_length, text.width)
        self.transformer = Transformer(text, config.quick_gelu)
        self.token_embedding = token_embedding
        self.ln_final = nn.LayerNorm(text.width)
        self.text_projection = parameter(text.width, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self._initialise_text()

    def forward(self, pixels: Tensor, tokens: Tensor) -> Embeddings:
        """(N, 3, S, S), normalised as `Preprocessing` does, and (M, C) int64."""
        images, texts = self.encode_image(pixels), self.encode_text(tokens)
        return Embeddings(F.normalize(images, dim=-1), F.normalize(texts, dim=-1), self.logit_scale.exp())

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, E), of any length."""
        embedded: Tensor = self.visual(pixels)
        return embedded

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(M, C) int64 -> (M, E), of any length."""
        config = self.text_config
        x = self.token_embedding(tokens) + self.positional_embedding  # (M, C, W)
        x = self.ln_final(self.transformer(x, causal=not config.no_causal_mask))
        match config.pool_type:
            case "first":
                position = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
            case "last":
                position = torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
            case "argmax":
                position = tokens.argmax(-1)
            case "eos":
                position = (tokens == config.eos_id).int().argmax(-1)
        return x[torch.arange(len(x), device=x.device), position] @ self.text_projection

    def _initialise_text(self) -> None:
        """As OpenAI's CLIP; deep blocks start with smaller steps (Radford et al. 2019, section 2.3)."""
        width, layers = self.text_config.width, self.text_config.layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        residual = (2 * layers * width) ** -0.5
        stds = {
            "attn.in_proj_weight": width**-0.5,
            "attn.out_proj.weight": residual,
            "mlp.c_fc.weight": (2 * width) ** -0.5,
            "mlp.c_proj.weight": residual,
        }
        for name, weight in self.transformer.named_parameters():  # resblocks.N. ...
            if (std := stds.get(name.split(".", 2)[2])) is not None:
                nn.init.normal_(weight, std=std)
        nn.init.normal_(self.text_projection, std=width**-0.5)


class Pretrained(NamedTuple):
    """All that a folder or a public name stands for."""

    model: nn.Module  # a CLIP, or what open_clip builds where the config is not known
    tokenizer: Callable[[list[str]], Tensor]  # M texts -> (M, C) int64
    config: dict[str, Any]  # of `open_clip_config.json`: model_cfg and preprocess_cfg
