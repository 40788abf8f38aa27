"""Perceptual distances: LPIPS for users with a network, and the image tower of a CLIP, which can be one's own.

Both compare unit-normalised features of several depths position by position (Zhang et al. 2018, equation 1); with a
CLIP there are no learned channel weights.
"""

from pathlib import Path
from typing import Annotated, Literal, assert_never
from urllib.error import URLError

import torch
from pydantic import Field
from torch import Tensor, nn

from common.config import Config
from common.errors import InputError


class LPIPSConfig(Config):
    type: Literal["lpips"] = "lpips"
    net: Literal["vgg", "alex", "squeeze"] = "vgg"


class CLIPFeaturesConfig(Config):
    type: Literal["clip"] = "clip"
    folder: Path  # open_clip's local-dir layout with a ResNet tower, as tessera train reranker writes it
    stages: tuple[int, ...] = Field((0, 1, 2, 3), min_length=1)  # 0 is the stem


PerceptualConfig = Annotated[LPIPSConfig | CLIPFeaturesConfig, Field(discriminator="type")]


def build_perceptual(config: LPIPSConfig | CLIPFeaturesConfig) -> nn.Module:
    """A frozen module `(images, reference) -> scalar`, both (B, 3, H, W) in [-1, 1]; 0 for equal pictures."""
    match config:
        case LPIPSConfig():
            return LPIPS(config.net)
        case CLIPFeaturesConfig():
            return CLIPFeatures(config.folder, config.stages)
        case _:
            assert_never(config)


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity (torchmetrics' port); its trunk's weights come from torchvision."""

    def __init__(self, net: Literal["vgg", "alex", "squeeze"]) -> None:
        super().__init__()
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self.metric = LearnedPerceptualImagePatchSimilarity(net_type=net)
        except ModuleNotFoundError:
            raise InputError("LPIPS needs torchmetrics: pip install 'tessera[metrics]'") from None
        except (URLError, OSError) as error:
            raise InputError(
                f"LPIPS needs the weights of torchvision's {net}, which cannot be downloaded ({error}); put the file "
                f"into {torch.hub.get_dir()}/checkpoints or set loss.perceptual.type=clip"
            ) from error
        self.requires_grad_(False)

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        distance: Tensor = self.metric(images.clamp(-1, 1), reference)
        return distance


class CLIPFeatures(nn.Module):
    """Mean squared distance between unit-normalised features of a CLIP's ResNet tower, averaged over `stages`."""

    mean: Tensor
    std: Tensor

    def __init__(self, folder: Path, stages: tuple[int, ...]) -> None:
        super().__init__()
        import open_clip
        from open_clip.modified_resnet import ModifiedResNet

        if not (folder / "open_clip_config.json").is_file():
            raise InputError(f"{folder} has no open_clip_config.json; train it with tessera train reranker")
        model = open_clip.create_model(f"local-dir:{folder.resolve()}", require_pretrained=True)
        tower = getattr(model, "visual", None)
        if not isinstance(tower, ModifiedResNet):
            raise InputError(f"{folder} must hold a CLIP with a ResNet image tower, got {type(tower).__name__}")
        if not set(stages) <= set(range(5)):
            raise InputError(f"loss.perceptual.stages must be among 0 to 4, got {stages}")
        self.tower, self.stages = tower.eval().requires_grad_(False), stages
        preprocess = model.visual.preprocess_cfg
        self.register_buffer("mean", torch.tensor(preprocess["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocess["std"]).view(3, 1, 1))

    def train(self, mode: bool = True) -> "CLIPFeatures":
        return super().train(False)  # running statistics of the tower never move

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(reference)
        distances = [(a - b).square().sum(1).mean() for a, b in zip(self.features(images), wanted, strict=True)]
        return torch.stack(distances).mean()

    def features(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> of each stage (B, C, h, w) float32 of unit length along C."""
        x = self.tower.stem(((images + 1) / 2 - self.mean) / self.std)
        found = [x] if 0 in self.stages else []
        for stage in range(1, max(self.stages) + 1):
            x = getattr(self.tower, f"layer{stage}")(x)
            if stage in self.stages:
                found.append(x)
        return [torch.nn.functional.normalize(feature.float(), dim=1, eps=1e-6) for feature in found]
