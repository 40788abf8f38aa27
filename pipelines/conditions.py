"""Prompts that are not text: a class label, a segmentation map, and no condition at all.

Each is a string that says what it is, so that pictures are named after it and remember it as they do a text. `class
207` as plain text is a label where the prior draws from class labels; a map has to be opened, since a file that a text
names is not read.
"""

from pathlib import Path

import torch
from torch import Tensor

from stage1_tokenizer import Autoencoder
from stage2_prior.base import Prior
from tessera.errors import InputError
from tessera.images import read_map
from tessera.paths import expand, is_file


class ClassLabel(str):
    """`class 207`, or with the name that the prior has for it."""

    label: int | str

    def __new__(cls, label: int | str) -> "ClassLabel":
        made = super().__new__(cls, f"class {label}")
        made.label = label
        return made

    def __getnewargs__(self) -> tuple[int | str]:  # type: ignore[override]
        """What a copy is made from."""
        return (self.label,)


class SegmentationMap(str):
    """`segmentation street.png`, with the file that it is in."""

    path: Path

    def __new__(cls, path: str | Path) -> "SegmentationMap":
        """Raises InputError when there is no such file."""
        path = expand(path)
        if not is_file(path):
            raise InputError(f"{path} does not exist; give the file of a segmentation map")
        made = super().__new__(cls, f"segmentation {Path(path).name}")
        made.path = Path(path)
        return made

    def __getnewargs__(self) -> tuple[Path]:  # type: ignore[override]
        """What a copy is made from."""
        return (self.path,)


class NoPrompt(str):
    """`no condition`, for a prior that was trained without any."""

    def __new__(cls) -> "NoPrompt":
        return super().__new__(cls, "no condition")

    def __getnewargs__(self) -> tuple[()]:  # type: ignore[override]
        return ()


def prompt_prefix(prior: Prior, prompt: str, segmentation_tokenizer: Autoencoder | None) -> Tensor:
    """What the prior reads of one prompt, (1, P). Raises InputError when it does not draw from such a one."""
    if isinstance(prompt, SegmentationMap):
        if segmentation_tokenizer is None:
            return prior.prefix(segmentation=torch.empty(1, 0, 0, 0))  # says what it draws from instead
        return prior.prefix(segmentation=map_codes(prompt.path, segmentation_tokenizer))
    if isinstance(prompt, ClassLabel):
        of_classes = prior.condition == "class"  # if not, `prefix` says what it draws from instead
        return prior.prefix(classes=[prior.class_number(str(prompt.label))] if of_classes else [])
    if isinstance(prompt, NoPrompt):
        return prior.prefix()
    match prior.condition:
        case "text":
            return prior.prefix([prompt])
        case "class":
            return prior.prefix(classes=[prior.class_number(prompt.strip().removeprefix("class ").strip())])
        case "segmentation":
            raise InputError(
                f"this prior draws from segmentation maps, give the file of one with --segmentation, got '{prompt:.60}'"
            )
        case "none":
            if prompt != NoPrompt():
                raise InputError(f"this prior draws from no condition, say --unconditional, got '{prompt:.60}'")
            return prior.prefix()


def map_codes(path: Path, tokenizer: Autoencoder) -> Tensor:
    """The codes (1, Q, h, w) of a map, see `read_map`."""
    pixels = read_map(path, tokenizer.image_size, tokenizer.config.trunk.image_channels)
    return tokenizer.encode(pixels[None].to(next(tokenizer.parameters()).device))
