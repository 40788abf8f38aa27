"""Perceptual distances: LPIPS for users with its weights, and the image tower of a CLIP, which can be one's own.

Both compare unit-normalised features of several depths position by position (Zhang et al. 2018, equation 1); with a
CLIP there are no learned channel weights.
"""

from pathlib import Path
from typing import Annotated, Literal, assert_never

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tessera.config import Config
from tessera.errors import InputError, reason
from tessera.paths import is_file
from tessera.weights.foreign import read_tensors

LPIPSNet = Literal["vgg", "alex", "squeeze"]


class LPIPSConfig(Config):
    type: Literal["lpips"] = "lpips"
    net: LPIPSNet = "vgg"
    weights: Path | None = None  # torchvision's file of that network, like vgg16-397923af.pth; None downloads it


class CLIPFeaturesConfig(Config):
    type: Literal["clip"] = "clip"
    folder: Path  # open_clip's local-dir layout with a ResNet tower, as tessera train reranker writes it
    stages: tuple[int, ...] = Field((0, 1, 2, 3), min_length=1)  # 0 is the stem


PerceptualConfig = Annotated[LPIPSConfig | CLIPFeaturesConfig, Field(discriminator="type")]


def build_perceptual(config: LPIPSConfig | CLIPFeaturesConfig) -> nn.Module:
    """A frozen module `(images, reference) -> scalar`, both (B, 3, H, W) in [-1, 1]; 0 for equal pictures."""
    match config:
        case LPIPSConfig():
            return LPIPS(config.net, config.weights)
        case CLIPFeaturesConfig():
            return CLIPFeatures(config.folder, config.stages)
        case _:
            assert_never(config)


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity, mean over pictures (Zhang et al. 2018, version 0.1 of its weights).

    The channel weights of its heads ship with torchmetrics; those of the trunk are torchvision's ImageNet classifier.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: LPIPSNet, weights: Path | None = None) -> None:
        super().__init__()
        self.taps = LPIPS_TAPS[net]
        for index, head in enumerate(_lpips_heads(net)):  # (1, C, 1, 1)
            self.register_buffer(f"head{index}", head)
        self.layers = nn.ModuleList(_torchvision_features(net, weights)[: self.taps[-1] + 1])
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "LPIPS":
        return super().train(False)

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(reference)
        distances = [
            (self.get_buffer(f"head{index}") * (a - b).square()).sum(1).mean()
            for index, (a, b) in enumerate(zip(self.features(images.clamp(-1, 1)), wanted, strict=True))
        ]
        return torch.stack(distances).sum()

    def features(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> at each tap (B, C, h, w) float32 of unit length along C."""
        x, found = (images - self.shift) / self.scale, []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in self.taps:
                feature = x.float()
                found.append(feature / (feature.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return found


# Layers of torchvision's `features` after which LPIPS looks: ReLUs, and SqueezeNet's later blocks.
LPIPS_TAPS: dict[LPIPSNet, tuple[int, ...]] = {
    "vgg": (3, 8, 15, 22, 29),
    "alex": (1, 4, 7, 9, 11),
    "squeeze": (1, 4, 7, 9, 10, 11, 12),
}


def _torchvision_features(net: LPIPSNet, weights: Path | None) -> nn.Sequential:
    """The convolutional layers of a torchvision classifier, with the weights of a local file or downloaded ones."""
    from torchvision import models

    name = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}[net]
    if weights is not None and not is_file(weights):
        raise InputError(f"loss.perceptual.weights: {weights} is not a file; give torchvision's weights of {name}")
    try:
        if weights is None:
            state = models.get_model_weights(name).DEFAULT.get_state_dict(progress=False, check_hash=True)
        else:
            state = read_tensors([weights])
    except InputError as error:
        raise InputError(f"loss.perceptual.weights: {weights} cannot be read as weights: {error}") from error
    except OSError as error:  # URLError is one
        raise InputError(
            f"LPIPS needs torchvision's weights of {name}, which cannot be downloaded ({error}); give the file as "
            "loss.perceptual.weights or set loss.perceptual.type=clip"
        ) from error
    except Exception as error:  # pickle, zip and torch each raise their own kinds here
        raise InputError(
            f"loss.perceptual.weights: {weights or name} cannot be read as weights ({type(error).__name__}); "
            f"give torchvision's file of {name}"
        ) from error
    with torch.device("meta"):  # the classifier on top is never made
        features: nn.Sequential = models.get_model(name, weights=None).features
    try:
        found = {key.removeprefix("features."): t for key, t in state.items() if key.startswith("features.")}
        features.load_state_dict(found, assign=True)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise InputError(
            f"{weights or name} does not hold torchvision's {name} ({reason(error)}); give that file"
        ) from error
    for layer in features.modules():  # in place, a later layer would change what a tap has kept
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    return features


def _lpips_heads(net: LPIPSNet) -> list[Tensor]:
    """The learned weights of the channels at each tap, (1, C, 1, 1)."""
    try:
        import torchmetrics.functional.image
    except ModuleNotFoundError:
        raise InputError("LPIPS needs torchmetrics: pip install 'tessera[metrics]'") from None
    path = Path(torchmetrics.functional.image.__path__[0]) / "lpips_models" / f"{net}.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{index}.model.1.weight"] for index in range(len(LPIPS_TAPS[net]))]


class CLIPFeatures(nn.Module):
    """Mean squared distance between unit-normalised features of a CLIP's ResNet tower, averaged over `stages`."""

    mean: Tensor
    std: Tensor

    def __init__(self, folder: Path, stages: tuple[int, ...]) -> None:
        super().__init__()
        import open_clip
        from open_clip.modified_resnet import ModifiedResNet

        if not is_file(folder / "open_clip_config.json"):
            raise InputError(f"{folder} has no open_clip_config.json; train it with tessera train reranker")
        try:
            model = open_clip.create_model(f"local-dir:{folder.resolve()}", require_pretrained=True)
        except Exception as error:  # open_clip, torch and json each raise their own kinds here
            raise InputError(f"{folder} cannot be loaded as a CLIP ({reason(error)}); restore it") from error
        tower = getattr(model, "visual", None)
        if not isinstance(tower, ModifiedResNet):
            raise InputError(f"{folder} must hold a CLIP with a ResNet image tower, got {type(tower).__name__}")
        if not set(stages) <= set(range(5)):
            raise InputError(f"loss.perceptual.stages must be among 0 to 4, got {stages}")
        self.tower, self.stages = tower.eval().requires_grad_(False), stages
        preprocess = model.visual.preprocess_cfg
        size = preprocess["size"]
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.register_buffer("mean", torch.tensor(preprocess["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocess["std"]).view(3, 1, 1))

    def train(self, mode: bool = True) -> "CLIPFeatures":
        return super().train(False)  # running statistics of the tower never move

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(reference)
        distances = [(a - b).square().sum(1).mean() for a, b in zip(self.features(images), wanted, strict=True)]
        return torch.stack(distances).mean()

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], brought to the CLIP's own size, -> the tower's embeddings (B, E), not normalised."""
        if images.shape[2:] != self.size:
            images = F.interpolate(images, size=self.size, mode="bilinear", antialias=True)
        embedded: Tensor = self.tower(((images + 1) / 2 - self.mean) / self.std)
        return embedded

    def features(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> of each stage (B, C, h, w) float32 of unit length along C."""
        x = self.tower.stem(((images + 1) / 2 - self.mean) / self.std)
        found = [x] if 0 in self.stages else []
        for stage in range(1, max(self.stages) + 1):
            x = getattr(self.tower, f"layer{stage}")(x)
            if stage in self.stages:
                found.append(x)
        return [F.normalize(feature.float(), dim=1, eps=1e-6) for feature in found]
