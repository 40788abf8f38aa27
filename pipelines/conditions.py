"""Prompts that are not text: a class label, and a segmentation map.

Each is a string that says what it is, so that pictures are named after it and remember it as they do a text. `class
207` as plain text is a label where the prior draws from class labels; a map has to be opened, since a file that a text
names is not read.
"""

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from common.errors import InputError
from common.images import fit, open_image, to_tensor
from stage1_tokenizer import Autoencoder
from stage2_prior.base import Prior


class ClassLabel(str):
    """`class 207`."""

    label: int

    def __new__(cls, label: int) -> "ClassLabel":
        made = super().__new__(cls, f"class {label}")
        made.label = label
        return made


class SegmentationMap(str):
    """`segmentation street.png`, with the file that it is in."""

    path: Path

    def __new__(cls, path: str | Path) -> "SegmentationMap":
        """Raises InputError when there is no such file."""
        if not Path(path).is_file():
            raise InputError(f"{path} does not exist; give the file of a segmentation map")
        made = super().__new__(cls, f"segmentation {Path(path).name}")
        made.path = Path(path)
        return made


def prompt_prefix(prior: Prior, prompt: str, segmentation_tokenizer: Autoencoder | None) -> Tensor:
    """What the prior reads of one prompt, (1, P). Raises InputError when it does not draw from such a one."""
    if isinstance(prompt, SegmentationMap):
        if segmentation_tokenizer is None:
            return prior.prefix(segmentation=torch.empty(1, 0, 0, 0))  # says what it draws from instead
        return prior.prefix(segmentation=map_codes(prompt.path, segmentation_tokenizer))
    if isinstance(prompt, ClassLabel):
        return prior.prefix(classes=[prompt.label])
    match prior.condition:
        case "text":
            return prior.prefix([prompt])
        case "class":
            number = re.fullmatch(r"\s*(?:class\s+)?(\d{1,9})\s*", prompt)
            if number is None:
                raise InputError(f"this prior draws from class labels, say --class 0 or 'class 0', got '{prompt:.60}'")
            return prior.prefix(classes=[int(number[1])])
        case "segmentation":
            raise InputError(
                f"this prior draws from segmentation maps, give the file of one with --segmentation, got '{prompt:.60}'"
            )


def map_codes(path: Path, tokenizer: Autoencoder) -> Tensor:
    """The codes (1, Q, h, w) of a map, scaled to the tokenizer's size by its shorter side and cut to a square.

    A tokenizer of labels reads a picture with one channel, whose values are the labels themselves (a palette's colours
    are of no matter); one of RGB pictures reads any picture.
    """
    channels, size = tokenizer.config.trunk.image_channels, tokenizer.image_size
    if channels == 3:
        pixels = to_tensor(fit(open_image(path), size))
    else:
        labels = torch.from_numpy(_labels(path, size, channels))  # (H, W)
        pixels = torch.nn.functional.one_hot(labels, channels).permute(2, 0, 1).float()
    return tokenizer.encode(pixels[None].to(next(tokenizer.parameters()).device))


def _labels(path: Path, size: int, count: int) -> np.ndarray:
    """(size, size) int64 in [0, count)."""
    try:
        with Image.open(path) as opened:
            image = opened if opened.mode in ("L", "P", "I", "I;16") else None
            if image is None:
                raise InputError(
                    f"{path} is a picture of mode {opened.mode}; a segmentation map has one channel, whose values are "
                    "the labels"
                )
            values = np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.NEAREST)).astype(np.int64)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not a readable picture ({' '.join(str(error).split())})") from None
    if values.min() < 0 or values.max() >= count:
        raise InputError(f"{path} has the label {values.max()}, and this tokenizer knows labels 0 to {count - 1}")
    return values
