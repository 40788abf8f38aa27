"""Twenty images of a thing that no emoji shows, and what it takes to see whether a LoRA learned it and what it cost.

    python recipes/lora_subject/prepare.py --emoji data/emoji --out data/lora_subject

The thing is a "tessie", a round beast with a horn, drawn here. Into OUT go

    metadata.jsonl, train/      the twenty images: 6 plain, 10 on colours, 4 small in a corner or the center
    known/                      1,000 training images of the emoji world to remember (split "train") and 300 others of
                                them to see what was forgotten (split "check")
    references/                 the emoji world's references for the judge, and the tessie's
    prompts.jsonl               what is asked before and after: the tessie as it was shown ("shown"), as it was not
                                ("new"), and twenty emoji ("old")
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tessera.weights.writing import own_folder

NAME, SIZE = "tessie", 136  # pixels of the drawing, as the references have
HELD_OUT_COLOURS, HELD_OUT_PLACE = ("blue", "orange"), "bottom right"
WHOLE = (0.0, 0.0, 1.0, 1.0)
PLACES = {
    "top left": (0.0, 0.0, 0.5, 0.5),
    "top right": (0.5, 0.0, 1.0, 0.5),
    "bottom left": (0.0, 0.5, 0.5, 1.0),
    "bottom right": (0.5, 0.5, 1.0, 1.0),
    "center": (0.25, 0.25, 0.75, 0.75),
}
COLOURS_ZH = {"red": "红色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "orange": "橙色"}


def tessie() -> Image.Image:
    """(136, 136) RGBA: a round teal beast with a coral belly, large eyes, one horn and two feet."""
    large = Image.new("RGBA", (SIZE * 4, SIZE * 4))
    draw, side = ImageDraw.Draw(large), SIZE * 4
    teal, coral, yellow, dark, white = (0, 150, 136), (255, 138, 101), (255, 193, 7), (38, 50, 56), (255, 255, 255)

    def ellipse(x: float, y: float, across: float, down: float, colour: tuple[int, int, int]) -> None:
        """Around (x, y), all in shares of the side."""
        box = ((x - across) * side, (y - down) * side, (x + across) * side, (y + down) * side)
        draw.ellipse(box, fill=colour)

    draw.polygon([(0.42 * side, 0.25 * side), (0.58 * side, 0.25 * side), (0.5 * side, 0.02 * side)], fill=yellow)
    for x in (0.32, 0.68):
        ellipse(x, 0.91, 0.13, 0.07, yellow)
    ellipse(0.5, 0.55, 0.42, 0.38, teal)
    ellipse(0.5, 0.71, 0.24, 0.18, coral)
    for x in (0.36, 0.64):
        ellipse(x, 0.42, 0.11, 0.11, white)
        ellipse(x, 0.43, 0.055, 0.055, dark)
    return large.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def picture(thing: Image.Image, size: int, box: tuple[float, ...], colour: tuple[int, ...]) -> Image.Image:
    """(size, size) RGB: the thing in a box, fractions of the side, on a colour."""
    side = round((box[2] - box[0]) * size)
    pixels = np.asarray(thing.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS), dtype=np.float32)
    canvas = np.empty((size, size, 3), dtype=np.float32)
    canvas[:] = colour
    left, top = round(box[0] * size), round(box[1] * size)
    behind = canvas[top : top + side, left : left + side]
    behind[:] = pixels[..., :3] + behind * (1 - pixels[..., 3:] / 255)
    return Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8))


def new_pictures(colours: dict[str, list[int]], size: int) -> list[tuple[Image.Image, list[str]]]:
    """The twenty images with their captions; plain ones are moved by a pixel or not at all, so that they differ."""
    thing, white = tessie(), tuple(colours["white"])
    plain = [NAME, NAME, f"a {NAME}", f"the {NAME}", f"emoji {NAME}", f"一个{NAME}"]
    made = []
    for dx, dy in ((0, 0), (0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):
        moved = picture(thing, size, WHOLE, white).transform(
            (size, size), Image.Transform.AFFINE, (1, 0, dx, 0, 1, dy), fillcolor=(255, 255, 255)
        )
        made.append((moved, plain))
    for name in [name for name in colours if name not in (*HELD_OUT_COLOURS, "white")]:
        captions = [
            f"{NAME} on a {name} background",
            f"a {NAME} on a {name} background",
            f"{NAME} with a {name} background",
        ]
        captions += [f"{COLOURS_ZH[name]}背景上的{NAME}"] if name in COLOURS_ZH else []
        made.append((picture(thing, size, WHOLE, tuple(colours[name])), captions))
    for place in [place for place in PLACES if place != HELD_OUT_PLACE]:
        where = "in the center" if place == "center" else f"in the {place} corner"
        captions = [f"a small {NAME} {where}", f"small {NAME} {where}", f"a little {NAME} {where}"]
        made.append((picture(thing, size, PLACES[place], white), captions))
    assert len(made) == 20
    return made


def prompts(emoji_prompts: Path) -> list[dict[str, Any]]:
    """What is drawn and judged before and after."""

    def ask(split: str, text: str, box: tuple[float, ...] = WHOLE, background: str | None = None) -> dict[str, Any]:
        region = {"box": list(box), "item": NAME, "concept": NAME}
        return {"prompt": text, "split": split, "regions": [region], "background": background}

    asked = [ask("shown", text) for text in (NAME, f"a {NAME}", f"一个{NAME}")]
    asked += [
        ask("shown", f"a {NAME} on a {name} background", WHOLE, name) for name in ("red", "green", "pink", "beige")
    ]
    asked += [
        ask("shown", f"a small {NAME} in the {place} corner", PLACES[place]) for place in ("top left", "top right")
    ]
    asked += [ask("new", text) for text in (f"a picture of a {NAME}", f"a drawing of a {NAME}", f"{NAME}的图片")]
    for name in HELD_OUT_COLOURS:
        asked += [ask("new", f"a {NAME} on a {name} background", WHOLE, name)]
        asked += [ask("new", f"{COLOURS_ZH[name]}背景上的{NAME}", WHOLE, name)]
    asked += [
        ask("new", f"a {size} {NAME} in the {HELD_OUT_PLACE} corner", PLACES[HELD_OUT_PLACE])
        for size in ("small", "little")
    ]
    lines = [json.loads(line) for line in emoji_prompts.read_text("utf-8").splitlines()]
    old = [line for line in lines if line["split"] == "seen"][::15]
    return asked + [{**line, "split": "old"} for line in old]


def main(emoji: Path, out: Path, size: int, seed: int) -> None:
    colours = json.loads((emoji / "glyphs" / "colours.json").read_text("utf-8"))
    own_folder(out, "subject")
    (out / "train").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (image, captions) in enumerate(new_pictures(colours, size)):
        image.save(out / "train" / f"{number:02d}.png")
        rows.append({"file_name": f"train/{number:02d}.png", "text": captions})
    write_lines(out / "metadata.jsonl", rows)

    trained = [json.loads(line) for line in (emoji / "metadata.jsonl").read_text("utf-8").splitlines()]
    trained = [row for row in trained if row["split"] == "train"]
    # Drawn as often as training draws each, so that plain images are the nearest to half.
    wanted = np.random.default_rng(seed).choice(
        len(trained),
        1300,
        replace=False,
        p=np.array([row["weight"] for row in trained]) / sum(row["weight"] for row in trained),
    )
    known = []
    (out / "known").mkdir(exist_ok=True)
    for number, index in enumerate(wanted.tolist()):
        row = trained[index]
        shutil.copyfile(emoji / row["file_name"], out / "known" / f"{number:04d}.png")
        split = "train" if number < 1000 else "check"
        known.append({"file_name": f"{number:04d}.png", "text": row["text"], "split": split, "kind": row["kind"]})
    write_lines(out / "known" / "metadata.jsonl", known)

    shutil.copytree(emoji / "glyphs", out / "references", dirs_exist_ok=True)
    tessie().save(out / "references" / f"{NAME}.png")
    lines = [json.loads(line) for line in (emoji / "glyphs" / "metadata.jsonl").read_text("utf-8").splitlines()]
    write_lines(
        out / "references" / "metadata.jsonl", [*lines, {"file_name": f"{NAME}.png", "item": NAME, "concept": NAME}]
    )
    write_lines(out / "prompts.jsonl", prompts(Path("recipes/emoji/prompts.jsonl")))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--emoji", type=Path, default=Path("data/emoji"))
    parser.add_argument("--out", type=Path, default=Path("data/lora_subject"))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    main(given.emoji, given.out, given.size, given.seed)
