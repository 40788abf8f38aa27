"""Perceptual distances: LPIPS, for users who have its weights, and the image tower of a CLIP that Tessera trained.

Both compare unit-normalised features of several depths position by position (Zhang et al. 2018, equation 1); with a
CLIP there are no learned channel weights.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, assert_never

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tessera.clip.folder import load_model
from tessera.clip.preprocessing import Preprocessing
from tessera.config import Config, validate
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
    """A frozen module `(images, reference) -> scalar`, both (B, 3, H, W) in [-1, 1]; 0 for equal images."""
    match config:
        case LPIPSConfig():
            return LPIPS(config.net, config.weights)
        case CLIPFeaturesConfig():
            return CLIPFeatures(config.folder, config.stages)
        case _:
            assert_never(config)


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity, mean over images (Zhang et al. 2018, version 0.1 of its weights).

    It is torchmetrics' public metric. The weights of its heads ship with that; those of the trunk are torchvision's
    ImageNet classifier, for which the metric has no argument: torchvision loads them from the cache of torch.hub or
    downloads them. A local file is offered to it as that cache while it is built (`_hub_that_holds`). Under autocast
    the metric's heads, and so its value, have the reduced precision.
    """

    def __init__(self, net: LPIPSNet, weights: Path | None = None) -> None:
        super().__init__()
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
        except ModuleNotFoundError:
            raise InputError("LPIPS needs torchmetrics: pip install 'tessera[metrics]'") from None
        from torchvision.models import get_model_weights

        name = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}[net]
        if weights is not None and not is_file(weights):
            raise InputError(f"loss.perceptual.weights: {weights} is not a file; give torchvision's weights of {name}")
        try:
            if weights is None:
                self.metric = LearnedPerceptualImagePatchSimilarity(net)
            else:
                with _hub_that_holds(weights, Path(get_model_weights(name).DEFAULT.url).name):
                    self.metric = LearnedPerceptualImagePatchSimilarity(net)
        except InputError as error:
            raise InputError(f"loss.perceptual.weights: {weights} cannot be read as weights: {error}") from error
        except OSError as error:  # URLError is one
            raise InputError(
                f"LPIPS needs torchvision's weights of {name}, which cannot be downloaded ({error}); give the file as "
                "loss.perceptual.weights or set loss.perceptual.type=clip"
            ) from error
        except Exception as error:  # other names or shapes; pickle, zip and torch raise their own kinds for a bad cache
            raise InputError(
                f"{weights or 'the cache of torch.hub'} does not hold torchvision's {name} ({reason(error)}); "
                "give that file"
            ) from error
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "LPIPS":
        return super().train(False)

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        difference = (images - reference).mean()
        if bool(difference.isnan()):  # the metric raises on nan, a training reports the step and the batch
            return difference
        distance: Tensor = self.metric(images.clamp(-1, 1), reference.clamp(-1, 1))
        self.metric.reset()  # it would keep the value of every step, and the graph with it
        return distance


@contextmanager
def _hub_that_holds(weights: Path, download: str) -> Iterator[None]:
    """Inside, the cache of torch.hub is a temporary folder, where the file `download` has the tensors of `weights`.

    Copied rather than linked, because torchvision unpickles what it finds there, with any code in it.
    """
    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").mkdir()
        torch.save(read_tensors([weights]), Path(folder) / "checkpoints" / download)
        torch.hub.set_dir(folder)
        try:
            yield
        finally:
            torch.hub.set_dir(before)


class CLIPFeatures(nn.Module):
    """Mean squared distance between unit-normalised features of a CLIP's ResNet tower, averaged over `stages`."""

    mean: Tensor
    std: Tensor

    def __init__(self, folder: Path, stages: tuple[int, ...]) -> None:
        super().__init__()
        model, config = load_model(folder)
        tower: Any = model.visual
        if not hasattr(tower, "stem"):  # that of open_clip's ResNet has the same parts, for configs that only it knows
            raise InputError(f"{folder} must hold a CLIP with a ResNet image tower, got {type(tower).__name__}")
        if not set(stages) <= set(range(5)):
            raise InputError(f"loss.perceptual.stages must be among 0 to 4, got {stages}")
        self.tower, self.stages = tower.requires_grad_(False), stages
        preprocessing = validate(Preprocessing, config["preprocess_cfg"], where=f"preprocess_cfg of {folder}")
        self.size = preprocessing.target
        for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
            self.register_buffer(name, torch.tensor(values).expand(3).view(3, 1, 1))
        self.eval()

    def train(self, mode: bool = True) -> "CLIPFeatures":
        return super().train(False)  # running statistics of the tower never move

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        with torch.no_grad():
            expected = self.features(reference)
        distances = [(a - b).square().sum(1).mean() for a, b in zip(self.features(images), expected, strict=True)]
        return torch.stack(distances).mean()

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], resized to the CLIP's input, -> the tower's embeddings (B, E), not normalised."""
        if images.shape[2:] != self.size:
            images = F.interpolate(images, size=self.size, mode="bilinear", antialias=True)
        embedded: Tensor = self.tower(((images + 1) / 2 - self.mean) / self.std)
        return embedded

    def features(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> for each stage (B, C, h, w) float32 of unit length along C."""
        x = self.tower.stem(((images + 1) / 2 - self.mean) / self.std)
        found = [x] if 0 in self.stages else []
        for stage in range(1, max(self.stages) + 1):
            x = getattr(self.tower, f"layer{stage}")(x)
            if stage in self.stages:
                found.append(x)
        return [F.normalize(feature.float(), dim=1, eps=1e-6) for feature in found]
