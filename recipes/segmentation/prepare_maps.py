"""Glyphs of the emoji world with their segmentation maps, from the same font and split as recipes/emoji.

    python recipes/segmentation/prepare_maps.py --out data/segmentation

Each trained glyph is drawn plain on white; the held-out ones (tone, gender, colour) make the split `test`. A map says
where the glyph is (its alpha) and which colour each region of it has, see labels.py.

    OUT/images/*.png, OUT/maps/*.png      the same names
    OUT/metadata.jsonl                      file_name, segmentation, split: for the prior
    OUT/maps/metadata.jsonl                 file_name, split: for the maps' own tokenizer
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from tessera.errors import InputError
from tessera.weights.writing import own_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
from glyphs import DEFAULT_FONT, compose, load_items, premultiplied
from labels import label_glyph, map_picture
from split import split_items


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw glyphs and their segmentation maps.")
    parser.add_argument("--out", type=Path, default=Path("data/segmentation"), help="default: data/segmentation")
    parser.add_argument("--font", type=Path, default=DEFAULT_FONT, help="a CBDT colour-emoji font")
    parser.add_argument("--size", type=int, default=32, help="side of the pictures in pixels (default: 32)")
    arguments = parser.parse_args()
    if not arguments.font.is_file():
        message = f"no font at {arguments.font}: install fonts-noto-color-emoji or give --font"
        print(f"prepare_maps.py: {message}", file=sys.stderr)
        return 2
    try:
        own_folder(arguments.out, "segmentation")
    except InputError as error:
        print(f"prepare_maps.py: {error}", file=sys.stderr)
        return 2
    items, _ = load_items(arguments.font)
    splits, out = split_items(items), arguments.out
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    (out / "maps").mkdir(exist_ok=True)
    rows, map_rows = [], []
    for number, item in enumerate(tqdm(items, unit="picture", disable=not sys.stderr.isatty())):
        name, split = f"{number:04d}.png", "train" if splits[item.id] == "train" else "test"
        glyph = premultiplied(item.bitmap, arguments.size)
        picture = compose(glyph, np.full(3, 255, dtype=np.float32))
        Image.fromarray(np.rint(picture).astype(np.uint8)).save(out / "pictures" / name)
        map_picture(label_glyph(picture, glyph[..., 3] / 255)).save(out / "maps" / name)
        rows.append({"file_name": f"pictures/{name}", "segmentation": f"maps/{name}", "split": split})
        map_rows.append({"file_name": name, "split": split})
    (out / "maps" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in map_rows), encoding="utf-8")
    (out / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{out}: {len(rows)} pictures, {sum(row['split'] == 'train' for row in rows)} to train on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
