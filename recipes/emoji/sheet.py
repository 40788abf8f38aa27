"""A contact sheet: rows of images of every kind and split, each with one of its captions."""

from __future__ import annotations

import textwrap
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFont
from world import Scene

COLUMNS, CELL, TEXT = 12, 96, 58  # images a row, pixels of an image, pixels of its caption
CJK_FONTS = ("NotoSansCJK*", "NotoSansSC*", "NotoSerifCJK*", "wqy-*", "DroidSansFallback*", "SourceHanSans*")
FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "/Library/Fonts")
LATIN_FONTS = ("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "Arial.ttf")


def contact_sheet(out: Path, pictures: list[tuple[str, Scene]]) -> Image.Image:
    """Two rows of each kind of the training split, one of each held-out split; `images` are (file, scene)."""
    chinese = find_cjk_font()
    latin = find_latin_font()
    rows = []
    for kind, count in (("plain", 3), ("background", 2), ("small", 2), ("pair", 3)):
        rows += sample([p for p in pictures if p[1].split == "train" and p[1].kind == kind], count)
    for split in ("tone", "tone2", "gender", "colour", "background", "position", "pair"):
        rows += sample([p for p in pictures if p[1].split == split], 1)

    sheet = Image.new("RGB", (COLUMNS * CELL + 70, len(rows) * (CELL + TEXT)), (200, 200, 200))
    pen = ImageDraw.Draw(sheet)
    random = Random(0)
    for row, cells in enumerate(rows):
        y = row * (CELL + TEXT)
        scene = cells[0][1]
        pen.text((2, y + 4), f"{scene.split}\n{scene.kind}", fill=(0, 0, 0), font=latin)
        for column, (file, scene) in enumerate(cells):
            x = 70 + column * CELL
            with Image.open(out / file) as picture:
                sheet.paste(picture.resize((CELL - 2, CELL - 2), Image.Resampling.LANCZOS), (x, y))
            caption = random.choice([text for text in scene.captions if chinese or max(text) < "\u3000"] or ["?"])
            font, width = (latin, 17) if max(caption) < "\u3000" or chinese is None else (chinese, 9)
            pen.multiline_text((x, y + CELL), "\n".join(textwrap.wrap(caption, width)[:5]), (0, 0, 0), font, spacing=1)
    return sheet


def sample(pictures: list[tuple[str, Scene]], rows: int) -> list[list[tuple[str, Scene]]]:
    """Up to `rows` rows of images, drawn without repetition."""
    chosen = Random(len(pictures)).sample(pictures, min(len(pictures), rows * COLUMNS))
    return [chosen[start : start + COLUMNS] for start in range(0, len(chosen), COLUMNS)]


def find_latin_font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in LATIN_FONTS:
        try:
            return ImageFont.truetype(name, 9)
        except OSError:
            continue
    return ImageFont.load_default(9)


def find_cjk_font() -> ImageFont.FreeTypeFont | None:
    """A font with Chinese characters, where the machine has one in the usual folders."""
    for folder in map(Path, FONT_FOLDERS):
        for pattern in CJK_FONTS:
            for file in sorted(folder.rglob(pattern)):
                if file.suffix.lower() in (".ttf", ".ttc", ".otf"):
                    return ImageFont.truetype(str(file), 10)
    return None
