"""Pictures as a CLIP wants them: scaled, cut or padded to its size, normalised; what open_clip's transforms do.

PIL pictures come out equal to theirs, tensors as near as PIL's rounding to 8 bits allows.

Letters: N pictures, H W pixels, S side of the model's input.
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
    mean: float | tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's pictures
    std: float | tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"  # random is of training only
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"  # the side that fits; the other is cut or padded
    fill_color: int = 0

    def of_picture(self, picture: Image.Image) -> Tensor:
        """A PIL picture of any mode and size -> (3, S, S)."""
        height, width = self._scaled((picture.height, picture.width))
        if (width, height) != picture.size:
            filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
            picture = picture.resize((width, height), filters[self._filter])
        if self.resize_mode == "longest":
            bands = len(picture.getbands())
            fill = self.fill_color if bands == 1 else (self.fill_color,) * bands
            picture = ImageOps.expand(picture, self._border(height, width), fill)
        top, left = self._corner(picture.height, picture.width)
        picture = picture.crop((left, top, left + self._target[1], top + self._target[0]))
        pixels = torch.from_numpy(np.array(picture.convert(self.mode))).permute(2, 0, 1).contiguous()
        return self._normalised(pixels.float() / 255)

    def of_tensor(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, 3, S, S) float32."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"images must be (N, 3, H, W) in [-1, 1], got {tuple(images.shape)}")
        pixels = (images.float() + 1) / 2
        height, width = self._scaled(pixels.shape[2:])
        # Width, then height, clipping what bicubic overshoots after each, as PIL does (which starts with the height
        # where that is squashed far more than the width).
        for step in ((pixels.shape[2], width), (height, width)):
            if step != tuple(pixels.shape[2:]):
                pixels = F.interpolate(pixels, size=step, mode=self._filter, antialias=True).clamp(0, 1)
        if self.resize_mode == "longest":
            left, top, right, bottom = self._border(height, width)
            pixels = F.pad(pixels, [left, right, top, bottom], value=self.fill_color / 255)
        top, left = self._corner(*pixels.shape[2:])
        return self._normalised(pixels[:, :, top : top + self._target[0], left : left + self._target[1]])

    def _normalised(self, pixels: Tensor) -> Tensor:
        """(..., 3, S, S) in [0, 1] -> the same shape."""
        mean, std = (torch.tensor(values, device=pixels.device).expand(3) for values in (self.mean, self.std))
        return (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)

    @property
    def _target(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def _filter(self) -> str:
        """open_clip does not look at `interpolation` where it fits the shorter side of inputs that are not square."""
        height, width = self._target
        looks = self.resize_mode != "shortest" or height == width
        return "bilinear" if self.interpolation == "bilinear" and looks else "bicubic"

    def _scaled(self, size: Sequence[int]) -> tuple[int, int]:
        """The (height, width) that a picture of `size` is scaled to before it is cut or padded."""
        height, width = self._target
        if self.resize_mode == "squash":
            return height, width
        if self.resize_mode == "shortest" and height == width:  # torchvision's Resize, which cuts off, not rounds
            short = min(size)
            return tuple(height if side == short else int(height * side / short) for side in size)  # type: ignore
        ratios = size[0] / height, size[1] / width
        ratio = max(ratios) if self.resize_mode == "longest" else min(ratios)
        return round(size[0] / ratio), round(size[1] / ratio)

    def _border(self, height: int, width: int) -> tuple[int, int, int, int]:
        """What is missing left, above, right and below; the odd pixel goes right and below."""
        down, across = (max(0, wanted - side) for wanted, side in zip(self._target, (height, width), strict=True))
        return across // 2, down // 2, across - across // 2, down - down // 2

    def _corner(self, height: int, width: int) -> tuple[int, int]:
        """Top and left of the middle that is kept of a picture."""
        return round((height - self._target[0]) / 2), round((width - self._target[1]) / 2)
