"""Images between files, PIL and tensors. Everywhere in this project images are float RGB in [-1, 1], (B, 3, H, W)."""

import errno
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from tessera.errors import InputError, InputWarning, WriteError
from tessera.files import parse_json
from tessera.paths import expand
from tessera.weights.writing import new_file

METADATA_KEY = "tessera"  # the PNG text chunk that holds an image's origin as JSON, first behind the header
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def open_image(path: str | Path) -> Image.Image:
    """The image at `path` as RGB, turned as its EXIF says, transparency laid on white. InputError if broken."""
    with opened_image(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith(("I", "F")):  # PIL clips these to 8 bits instead of scaling them
            image = _to_8_bits(image, path)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


@contextmanager
def opened_image(path: str | Path) -> Iterator[Image.Image]:
    """What PIL reads at `path`, while it is worked on.

    Raises InputError for whatever PIL raises, because damaged files bring out almost any exception in its decoders.
    What it warns of becomes an InputWarning with the file's name; a large image alone is nothing to warn of.
    """
    path = expand(path)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with Image.open(path) as image:
                yield image
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give the path of a picture") from None
    except UnidentifiedImageError:
        raise InputError(f"{path} is not a readable picture (of no format that is known)") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is not a readable picture ({reason})") from None
    told = [one for one in caught if not issubclass(one.category, Image.DecompressionBombWarning)]
    for message in dict.fromkeys(" ".join(str(one.message).split()) for one in told):
        warnings.warn(f"{path}: {message}", InputWarning, stacklevel=4)


def _to_8_bits(image: Image.Image, path: str | Path) -> Image.Image:
    """A gray image of more than 8 bits: of 16 bits by its format, of floats by its own range."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode.startswith("F"):
        if not np.isfinite(values).all():
            raise InputError(f"{path} has pixels that are not numbers or infinite; save it with finite values alone")
        values = (values - values.min()) / max(float(np.ptp(values)), 1e-12) * 65535
    return Image.fromarray((values.clip(0, 65535) / 257).round().astype(np.uint8))


def fit(image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """Scales the shorter side to `size` and cuts the middle square; an image that fits already is left alone."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), resample)


def read_map(path: str | Path, size: int, channels: int = 3) -> Tensor:
    """A segmentation map, scaled to `size` by its shorter side and cut to a square, labels unmixed: (channels, H, W).

    With three channels any image is one, in the RGB of its labels' colours in [-1, 1]. With others it has one channel
    whose values are the labels themselves (a palette's colours are of no matter), and becomes 1 in the channel of its
    label and 0 elsewhere. Raises InputError when the file is broken, or when it has a label too many.
    """
    if channels == 3:
        return to_tensor(fit(open_image(path), size, Image.Resampling.NEAREST))
    labels = torch.from_numpy(_labels(path, size, channels))
    return torch.nn.functional.one_hot(labels, channels).permute(2, 0, 1).float()


def _labels(path: str | Path, size: int, count: int) -> np.ndarray:
    """(size, size) int64 in [0, count)."""
    with opened_image(path) as opened:
        if opened.mode not in ("L", "P", "I", "I;16"):
            raise InputError(
                f"{path} is a picture of mode {opened.mode}; a segmentation map has one channel, whose values are "
                "the labels"
            )
        values = np.asarray(fit(opened, size, Image.Resampling.NEAREST)).astype(np.int64)
    if values.min() < 0 or values.max() >= count:
        raise InputError(f"{path} has the label {values.max()}, and this tokenizer knows labels 0 to {count - 1}")
    return values


def open_mask(path: str | Path) -> Image.Image:
    """The mask at `path` in gray: white is drawn anew, black stays. InputError if broken or partly transparent."""
    image = open_image(path)
    with opened_image(path) as opened:
        if opened.has_transparency_data and opened.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            raise InputError(
                f"{path} has transparent parts, which may mean either; save the mask as white (drawn anew) and black "
                "(stays) alone"
            )
    return image.convert("L")


def white_cells(mask: Image.Image, grid: tuple[int, int]) -> Tensor:
    """Which cells of a code grid (h, w) a mask's white (128 of 255 and more) touches, where `fit` lays it: (h, w) bool.

    A cell is touched by a pixel of the mask that it shares an area with, however small.
    """
    white = torch.from_numpy(np.array(mask.convert("L"))) >= 128
    side = min(mask.size)

    def spans(size: int, count: int) -> list[slice]:
        """The pixels of each of `count` cells, side by side in the middle `side` of `size` pixels."""
        edges = [count * (size - side) + 2 * cell * side for cell in range(count + 1)]  # in 1 / (2 · count) pixels
        return [slice(a // (2 * count), -(-b // (2 * count))) for a, b in pairwise(edges)]

    rows, columns = (spans(*both) for both in zip(white.shape, grid, strict=True))
    return torch.tensor([[bool(white[row, column].any()) for column in columns] for row in rows])


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) float in [-1, 1] -> B RGB images; values outside are clipped."""
    pixels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def save_png(image: Image.Image, path: Path, origin: dict[str, Any] | None = None) -> None:
    """Writes a PNG, whole or not at all, with `origin` as JSON in its text chunk `tessera`, empty where there is none.

    Raises InputError when it cannot be written, WriteError when the disk is full.
    """
    info = PngImagePlugin.PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps(origin or {}, ensure_ascii=False))
    try:
        with new_file(path, sync=False) as part:
            # A colour profile would stand before our chunk. Level 3 takes a third of the time of 6, a tenth more bytes.
            image.save(part, format="PNG", pnginfo=info, icc_profile=None, compress_level=3)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WriteError(f"{path} could not be written: the disk is full; make room and start again") from None
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another folder") from None


def written_by_tessera(path: str | Path) -> bool:
    """Whether `save_png` wrote the file, by its first bytes: PNG signature, header, then the text chunk `tessera`.

    Raises OSError when the file cannot be opened.
    """
    mark = b"iTXt" + METADATA_KEY.encode() + b"\0"
    begin = len(PNG_SIGNATURE) + 25 + 4  # the header's chunk, then the length of the next one
    with open(path, "rb") as file:
        start = file.read(begin + len(mark))
    return start.startswith(PNG_SIGNATURE) and start[begin:] == mark


def read_origin(path: str | Path) -> dict[str, Any]:
    """The origin that `save_png` wrote. Raises InputError when the image has none."""
    with opened_image(path) as image:
        text = getattr(image, "text", {}).get(METADATA_KEY)
    remedy = "give a PNG as tessera generate wrote it"
    origin = {} if text is None else parse_json(text, f"the origin in {path}", remedy)
    if not origin:
        raise InputError(f"{path} does not carry its origin; only pictures written by tessera generate do")
    if not isinstance(origin, dict):
        raise InputError(f"the origin in {path} is no JSON object; {remedy}")
    return origin


def contact_sheet(images: list[Image.Image], labels: list[str], columns: int = 4, scale: int = 1) -> Image.Image:
    """All `images` (of one size) in rows of `columns`, each `scale` times as large with its label underneath."""
    width, height = images[0].width * scale, images[0].height * scale
    font = ImageFont.load_default(size=11)
    line, rows = 16, -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + 4) + 4, rows * (height + line + 4) + 4), "#e8e8e8")
    draw = ImageDraw.Draw(sheet)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = 4 + index % columns * (width + 4), 4 + index // columns * (height + line + 4)
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.text((x + 1, y + height + 1), label[: width // 6], fill="black", font=font)
    return sheet
