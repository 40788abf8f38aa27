"""A colour-emoji font as a list of items: what each is called, and its bitmap.

The font must carry CBDT bitmaps (Noto Color Emoji does: one strike of 136x128 PNGs). Every fully-qualified sequence
of the PyPI package `emoji` is shaped with HarfBuzz; it counts when exactly one glyph takes up room and that glyph has
a bitmap (a sequence that the font does not know falls apart into several glyphs, or into `.notdef`). Sequences with the
very same PNG data are one *item*: the shortest sequence gives the item its id and name, the others are further names;
among equally short ones the oldest emoji version wins, then the shorter English name (so it is "Norway", not "Bouvet
Island", whose flag is the same).

Ids are upper-case hexadecimal code points with spaces, as in "1F469 1F3FD 200D 1F680": woman astronaut, medium skin.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import NamedTuple

import emoji
import numpy as np
import uharfbuzz as hb
from fontTools.ttLib import TTFont
from numpy.typing import NDArray
from PIL import Image

DEFAULT_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SQUARE = 136  # pixels: the side of the square that a bitmap is centred on
SKIN_TONES = frozenset({"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"})
VARIATION_SELECTOR = "FE0F"
FULLY_QUALIFIED = 2  # the status of a sequence in the `emoji` package


class Item(NamedTuple):
    """One image of the font."""

    id: str  # code points with tones and variation selectors, "1F469 1F3FD 200D 1F680"
    base: str  # the same without tones and without FE0F: the concept
    names: tuple[str, ...]  # English, raw from the package (":woman_astronaut:"); the first is the item's own
    names_zh: tuple[str, ...]  # Chinese, raw, in the same order; "" where the package has none
    aliases: tuple[str, ...]  # further English names, raw
    bitmap: Image.Image  # RGBA, SQUARE x SQUARE, straight alpha

    @property
    def tones(self) -> int:
        return sum(code in SKIN_TONES for code in self.id.split())


def hexadecimal(sequence: str) -> str:
    return " ".join(f"{ord(character):X}" for character in sequence)


def base_of(item_id: str) -> str:
    """The sequence without skin tones and variation selectors."""
    return " ".join(code for code in item_id.split() if code not in SKIN_TONES and code != VARIATION_SELECTOR)


def load_items(font_path: Path = DEFAULT_FONT) -> tuple[list[Item], int]:
    """All items of a font, sorted by id, and the number of named sequences that they came from."""
    emoji.config.load_language("zh")
    data = emoji.EMOJI_DATA
    font = TTFont(font_path)
    bitmaps = font["CBDT"].strikeData[0]  # glyph name -> bitmap
    glyph_names = font.getGlyphOrder()
    shaper = hb.Font(hb.Face(hb.Blob.from_file_path(str(font_path))))

    groups: dict[str, list[str]] = {}  # SHA-256 of the PNG data -> sequences
    png: dict[str, bytes] = {}
    for sequence, entry in data.items():
        if entry["status"] != FULLY_QUALIFIED:
            continue
        buffer = hb.Buffer()
        buffer.add_str(sequence)
        buffer.guess_segment_properties()
        hb.shape(shaper, buffer)
        placed = zip(buffer.glyph_infos, buffer.glyph_positions, strict=True)
        visible = [glyph_names[info.codepoint] for info, position in placed if position.x_advance]
        if len(visible) != 1 or visible[0] not in bitmaps:
            continue
        image = bytes(bitmaps[visible[0]].imageData)
        digest = hashlib.sha256(image).hexdigest()
        png[digest] = image
        groups.setdefault(digest, []).append(sequence)

    items = []
    for digest, sequences in groups.items():
        sequences.sort(key=lambda s: (len(s), data[s]["E"], len(data[s]["en"]), s))
        item_id = hexadecimal(sequences[0])
        items.append(
            Item(
                id=item_id,
                base=base_of(item_id),
                names=tuple(data[s]["en"] for s in sequences),
                names_zh=tuple(data[s].get("zh", "") for s in sequences),
                aliases=tuple(alias for s in sequences for alias in data[s].get("alias") or ()),
                bitmap=on_square(Image.open(io.BytesIO(png[digest]))),
            )
        )
    items.sort(key=lambda item: [int(code, 16) for code in item.id.split()])
    return items, sum(map(len, groups.values()))


def on_square(bitmap: Image.Image) -> Image.Image:
    """The bitmap in the middle of a transparent square, RGBA."""
    bitmap = bitmap.convert("RGBA")
    square = Image.new("RGBA", (SQUARE, SQUARE))
    square.paste(bitmap, ((SQUARE - bitmap.width) // 2, (SQUARE - bitmap.height) // 2))
    return square


def premultiplied(bitmap: Image.Image, size: int) -> NDArray[np.float32]:
    """(size, size, 4) in [0, 255]: colour times alpha, and alpha; Lanczos, resized in premultiplied alpha."""
    return np.asarray(bitmap.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS), dtype=np.float32)


def compose(glyph: NDArray[np.float32], background: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lay a premultiplied glyph (h, w, 4) over a background that broadcasts to (h, w, 3), in [0, 255]."""
    return np.clip(glyph[..., :3] + background * (1.0 - glyph[..., 3:] / 255.0), 0.0, 255.0)
