"""Images as a CLIP reads them: scaled, cropped or padded to its size, normalised; what open_clip's transforms do.

PIL images come out equal to theirs, tensors as near as PIL's rounding to 8 bits allows.

Letters: N images, H W pixels, S side of the model's input.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from tessera.config import Config
from tessera.errors import InputError


class Preprocessing(Config):
    """`preprocess_cfg` of `open_clip_config.json`, with open_clip's defaults."""

    size: int | tuple[int, int] = 224  # of the model's input: side, or height and width
    mode: Literal["RGB"] = "RGB"
    mean: float | tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's training images
    std: float | tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"  # random is of training only
    resize_mode: Literal["shortest", "longest", "squash"] = (
        "shortest"  # the side that is fitted; crops or pads the other
    )
    fill_color: int = 0

    def from_image(self, image: Image.Image) -> Tensor:
        """A PIL image of any mode and size -> (3, S, S) float32."""
        height, width = self._scaled((image.height, image.width))
        if (width, height) != image.size:
            filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
            image = image.resize((width, height), filters[self._filter])
        if self.resize_mode == "longest":
            bands = len(image.getbands())
            fill = self.fill_color if bands == 1 else (self.fill_color,) * bands
            image = ImageOps.expand(image, self._border(height, width), fill)
        top, left = self._corner(image.height, image.width)
        image = image.crop((left, top, left + self.target[1], top + self.target[0]))
        pixels = torch.from_numpy(np.array(image.convert(self.mode))).permute(2, 0, 1).contiguous()
        return self._normalise(pixels.float() / 255)

    def from_tensor(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, 3, S, S) float32."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"images must be (N, 3, H, W) in [-1, 1], got {tuple(images.shape)}")
        pixels = (images.float() + 1) / 2
        height, width = self._scaled(pixels.shape[2:])
        # Width, then height, clipping what bicubic overshoots after each, as PIL does (which starts with the height
        # where that shrinks far more than the width).
        for step in ((pixels.shape[2], width), (height, width)):
            if step != tuple(pixels.shape[2:]):
                pixels = F.interpolate(pixels, size=step, mode=self._filter, antialias=True).clamp(0, 1)
        if self.resize_mode == "longest":
            left, top, right, bottom = self._border(height, width)
            pixels = F.pad(pixels, [left, right, top, bottom], value=self.fill_color / 255)
        top, left = self._corner(*pixels.shape[2:])
        return self._normalise(pixels[:, :, top : top + self.target[0], left : left + self.target[1]])

    def _normalise(self, pixels: Tensor) -> Tensor:
        """(..., 3, S, S) in [0, 1] -> the same shape."""
        mean, std = (torch.tensor(values, device=pixels.device).expand(3) for values in (self.mean, self.std))
        return (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)

    @property
    def target(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def _filter(self) -> str:
        """open_clip ignores `interpolation` where it fits the shorter side of inputs that are not square."""
        height, width = self.target
        ignored = self.resize_mode == "shortest" and height != width
        return "bilinear" if self.interpolation == "bilinear" and not ignored else "bicubic"

    def _scaled(self, size: Sequence[int]) -> tuple[int, int]:
        """The (height, width) that an image of `size` is scaled to before it is cropped or padded."""
        height, width = self.target
        if self.resize_mode == "squash":
            return height, width
        if self.resize_mode == "shortest" and height == width:  # torchvision's Resize, which rounds down
            short = min(size)
            return tuple(height if side == short else int(height * side / short) for side in size)  # type: ignore
        ratios = size[0] / height, size[1] / width
        ratio = max(ratios) if self.resize_mode == "longest" else min(ratios)
        return round(size[0] / ratio), round(size[1] / ratio)

    def _border(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Pixels of padding left, above, right and below; the odd pixel goes right and below."""
        down, across = (max(0, wanted - side) for wanted, side in zip(self.target, (height, width), strict=True))
        return across // 2, down // 2, across - across // 2, down - down // 2

    def _corner(self, height: int, width: int) -> tuple[int, int]:
        """Top and left of the centre crop."""
        return round((height - self.target[0]) / 2), round((width - self.target[1]) / 2)
