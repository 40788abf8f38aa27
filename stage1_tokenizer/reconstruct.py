"""What an image tokenizer makes of images, side by side with them: `tessera reconstruct IMAGES`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stage1_tokenizer.autoencoder import Autoencoder
from tessera.errors import InputError
from tessera.images import fit, open_image, save_png, to_pil, to_tensor, written_by_tessera
from tessera.metrics import psnr
from tessera.paths import expand

MOST_PIXELS = 2**22  # of an image at once, without tiles; attention at the code grid grows with the square of them


class Reconstruction(NamedTuple):
    image: str  # path, as it was given
    path: str  # the image written: original left, reconstruction right
    width: int
    height: int
    psnr: float  # dB


@torch.inference_mode()
def reconstruct(
    images: Sequence[str | Path],
    model: str | Path,
    output: str | Path,
    size: int | None = None,
    tile: int | None = None,
) -> list[Reconstruction]:
    """Encodes and decodes each image at its own size, or cut to `size` x `size`, and writes both into `output`.

    A side that the tokenizer's factor does not divide is continued by its last pixels, which are cut off again.
    `tile` bounds the memory that large images take, see tiling.py.
    An image of another hand is never overwritten: the new one gets a number, `0000-photo (2).png`.
    Raises InputError for a broken or a too large image, before anything is written.
    """
    tokenizer = Autoencoder.from_pretrained(model)
    opened = [open_image(path) if size is None else fit(open_image(path), size) for path in images]
    for path, image in zip(images, opened, strict=True):
        if image.width * image.height > MOST_PIXELS and tile is None:
            raise InputError(
                f"{path} has {image.width} x {image.height} pixels, at most {MOST_PIXELS:,} fit at once; "
                "give --tile 512 to go through it in parts, or --size"
            )
    folder = expand(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}; choose another folder") from None
    results = []
    for number, (path, image) in enumerate(zip(images, opened, strict=True)):
        original = to_tensor(image).unsqueeze(0)
        again = through(tokenizer, original, tile)
        target = free_path(folder, f"{number:04d}-{Path(path).stem}")
        save_png(beside(image, to_pil(again)[0]), target)
        figure = float(psnr(again, original))
        results.append(Reconstruction(str(path), str(target), image.width, image.height, figure))
    return results


def free_path(folder: Path, stem: str) -> Path:
    """`stem.png`, or `stem (2).png` and so on: the first that is not there yet or that Tessera wrote."""
    number = 1
    while True:
        path = folder / (f"{stem}.png" if number == 1 else f"{stem} ({number}).png")
        if not os.path.lexists(path) or (path.is_file() and written_by_tessera(path)):
            return path
        number += 1


def through(tokenizer: Autoencoder, images: Tensor, tile: int | None = None) -> Tensor:
    """Encoded and decoded, for sides of any length: (B, 3, H, W) in [-1, 1] -> the same."""
    height, width = images.shape[2:]
    padding = (0, -width % tokenizer.factor, 0, -height % tokenizer.factor)
    latents = tokenizer.encode_latents(F.pad(images, padding, mode="replicate"), tile)  # with or without codes
    decoded = tokenizer.decode_latents(latents, tile)
    return decoded[:, :, :height, :width]


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    both = Image.new("RGB", (left.width + right.width, left.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both
