"""Draw the emoji world: a small text-to-image data set from a colour-emoji font that anybody can rebuild.

    python recipes/emoji/prepare.py --out data/emoji --prompts recipes/emoji/prompts.jsonl

Needs the Debian package fonts-noto-color-emoji (or another CBDT colour-emoji font by --font) and the Python packages
emoji, uharfbuzz and fonttools. The same font, packages and seed give the same files. It writes

    OUT/metadata.jsonl        one line per image: file_name, text (true captions), split, kind, items, weight
    OUT/train/*.png           about 46,000 images; a draw by `weight` is 45 % plain, 20 % on a coloured background,
                              10 % one small glyph, 25 % two glyphs
    OUT/tone/*.png ...        images of each held-out split: tone, tone2, gender, colour, background, position, pair
    OUT/glyphs/               every glyph with its names, RGBA 136x136, and colours.json: what the judge compares with
    OUT/contact_sheet.png     some images of every kind and split with one of their captions

and, where --prompts is given, the evaluation's fixed list of prompts.

What it is not: photographs. One drawing style, one glyph a concept, no jitter, white around small glyphs and pairs.
Combinations whose glyph would hardly be seen on its background (a red square on red) are left out of all splits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from captions import Names, name_items
from glyphs import DEFAULT_FONT, Item, compose, load_items, premultiplied
from numpy.typing import NDArray
from PIL import Image
from sheet import contact_sheet
from tqdm import tqdm
from world import (
    COLOURS,
    SHARES,
    TRAIN_PICTURES,
    WHITE,
    Scene,
    World,
    build_world,
    evaluation_prompts,
    held_out_scenes,
    training_scenes,
)

from tessera.errors import InputError
from tessera.weights.writing import own_folder

EXPECTED = {"sequences": 3789, "items": 3771, "train": 3462, "tone": 156, "tone2": 33, "gender": 114, "colour": 6}


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the emoji world: pictures, captions, splits and prompts.")
    parser.add_argument("--out", type=Path, default=Path("data/emoji"), help="folder to write (default: data/emoji)")
    parser.add_argument("--font", type=Path, default=DEFAULT_FONT, help="a CBDT colour-emoji font")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels, a multiple of 4")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is drawn; the split does not depend on it")
    kinds = ", ".join(SHARES)
    parser.add_argument("--shares", type=float, nargs=len(SHARES), default=list(SHARES.values()), metavar="SHARE",
                        help=f"of the draws, those of {kinds}; as given they need not add up to 1")  # fmt: skip
    parser.add_argument("--times", type=float, default=1.0, help="as many training pictures of each kind but plain")
    parser.add_argument("--prompts", type=Path, help="also write the evaluation's prompts to this file")
    arguments = parser.parse_args()
    if not arguments.font.is_file():
        message = f"no font at {arguments.font}: install fonts-noto-color-emoji or pass --font"
        print(f"prepare.py: {message}.", file=sys.stderr)
        return 2
    if arguments.size < 16 or arguments.size % 4:
        print(f"prepare.py: --size must be a multiple of 4 from 16 on, got {arguments.size}.", file=sys.stderr)
        return 2

    if min(arguments.shares) <= 0 or not 0 < arguments.times <= 2:
        print(
            "prepare.py: --shares must be above 0 and --times at most 2, since a picture is drawn once.",
            file=sys.stderr,
        )
        return 2

    try:
        own_folder(arguments.out, "emoji")
    except InputError as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    items, sequences = load_items(arguments.font)
    names = name_items(items)
    world = build_world(items, names)
    check_counts(world, sequences)

    shares = {kind: share / sum(arguments.shares) for kind, share in zip(SHARES, arguments.shares, strict=True)}
    counts = {kind: round(count * arguments.times) for kind, count in TRAIN_PICTURES.items()}
    scenes = training_scenes(world, arguments.seed, counts, shares) + held_out_scenes(world, arguments.seed)
    out: Path = arguments.out
    for folder in {"glyphs", *(scene.split for scene in scenes)}:
        (out / folder).mkdir(exist_ok=True)
        for picture in (out / folder).glob("*.png"):  # of a preparation before, with other images under these names
            picture.unlink()
    write_glyphs(out / "glyphs", world)
    files = write_pictures(out, world, scenes, arguments.size)
    contact_sheet(out, list(zip(files, scenes, strict=True))).save(out / "contact_sheet.png")
    if arguments.prompts:
        write_prompts(arguments.prompts, world, arguments.seed)
    print(json.dumps(Counter(f"{scene.split}/{scene.kind}" for scene in scenes), indent=2))
    return 0


def check_counts(world: World, sequences: int) -> None:
    """Print the counts, and say so where they are not those of the reference font and package."""
    counts = {"sequences": sequences, "items": len(world.items), **Counter(world.split.values())}
    for name, expected in EXPECTED.items():
        print(f"{name:>10}: {counts.get(name, 0)}", file=sys.stderr)
        if counts.get(name) != expected:
            message = f"expected {expected} {name}, got {counts.get(name)}: another font or version of emoji was used"
            print(f"warning: {message}; figures will not compare with the published ones", file=sys.stderr)


def write_pictures(out: Path, world: World, scenes: list[Scene], size: int) -> list[str]:
    """Draw the scenes; returns their files, relative to `out`. metadata.jsonl is written last."""
    glyphs: dict[tuple[str, int], NDArray[np.float32]] = {}
    numbers: Counter[str] = Counter()
    files, lines = [], []
    for scene in tqdm(scenes, desc="pictures", unit=" pictures", file=sys.stderr):
        file = f"{scene.split}/{numbers[scene.split]:06d}.png"
        numbers[scene.split] += 1
        draw(scene, world, size, glyphs).save(out / file, compress_level=4)
        line = {
            "file_name": file,
            "text": scene.captions,
            "split": scene.split,
            "kind": scene.kind,
            "items": [item for item, _ in scene.glyphs],
            "weight": scene.weight,
        }
        files.append(file)
        lines.append(json.dumps(line, ensure_ascii=False))
    write_whole(out / "metadata.jsonl", lines)
    return files


def draw(
    scene: Scene, world: World, size: int, cache: dict[tuple[str, int], NDArray[np.float32]] | None = None
) -> Image.Image:
    """The scene as an RGB image of size x size; `cache` keeps resized glyphs from one call to the next."""
    cache = {} if cache is None else cache
    picture = np.empty((size, size, 3), dtype=np.float32)
    picture[:] = COLOURS[scene.background] if scene.background else WHITE
    for item, (left, top, right, _) in scene.glyphs:
        side, x, y = round((right - left) * size), round(left * size), round(top * size)
        if (item, side) not in cache:
            cache[item, side] = premultiplied(world.items[item].bitmap, side)
        region = picture[y : y + side, x : x + side]
        region[:] = compose(cache[item, side], region)
    return Image.fromarray(np.rint(picture).astype(np.uint8))


def write_glyphs(folder: Path, world: World) -> None:
    lines = []
    for number, item in enumerate(world.items.values()):
        file = f"{number:04d}.png"
        item.bitmap.save(folder / file, compress_level=4)
        lines.append(json.dumps(glyph_line(file, item, world.names[item.id], world.split[item.id]), ensure_ascii=False))
    (folder / "colours.json").write_text(json.dumps(COLOURS | {"white": WHITE}) + "\n", encoding="utf-8")
    write_whole(folder / "metadata.jsonl", lines)


def glyph_line(file: str, item: Item, names: Names, split: str) -> dict[str, str | None]:
    return {
        "file_name": file,
        "item": item.id,
        "concept": item.base,
        "name": names.en,
        "name_zh": names.zh,
        "split": split,
    }


def write_prompts(file: Path, world: World, seed: int) -> None:
    lines = []
    for prompt in evaluation_prompts(world, seed):
        regions = [{"box": box, "item": item, "concept": world.items[item].base} for box, item in prompt.regions]
        line = {"prompt": prompt.prompt, "split": prompt.split, "regions": regions, "background": prompt.background}
        lines.append(json.dumps(line, ensure_ascii=False))
    write_whole(file, lines)


def write_whole(file: Path, lines: list[str]) -> None:
    """All lines or no file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(file)


if __name__ == "__main__":
    sys.exit(main())
