"""Every member of the tokenizer family at equal compute on the emoji world: trained, measured, and side by side.

    python recipes/family/family.py                           all of it, into runs/family
    python recipes/family/family.py --steps 20 --out /tmp/f   a trial

One recipe a member is written to the run folder and trained from there, one after another; each continues where it was
stopped, and members that have been measured already are not measured again. Figures are over held-out images, of all
splits of the data but train.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image, ImageDraw, ImageFont

from stage1_tokenizer import Autoencoder
from stage1_tokenizer.evaluate import evaluate
from stage1_tokenizer.train import train
from tessera.data.folder import read_items
from tessera.data.source import ImageFolder
from tessera.images import fit, open_image, save_png, to_pil

HERE = Path(__file__).parent
SHOWN = 8  # images of the grid
COLUMNS = {  # of the table: heading, key in the report, format
    "PSNR": ("psnr", "{:.2f}"),
    "SSIM": ("ssim", "{:.3f}"),
    "CLIP distance": ("clip_distance", "{:.4f}"),
    "CLIP Fréchet": ("clip_frechet", "{:.4f}"),
    "codes used": ("codes_used", "{:.0%}"),
    "perplexity": ("perplexity", "{:.0f}"),
    "images/s": ("images_per_second", "{:.0f}"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/family"), help="folder of runs, figures and table")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="as recipes/emoji/prepare.py writes it")
    parser.add_argument("--clip", type=Path, default=Path("pipelines/bundles/emoji/reranker"), help="for its features")
    parser.add_argument("--steps", type=int, help="of training; those of base.yaml when left out")
    parser.add_argument("--pictures", type=int, default=512, help="held-out ones that figures are over, evenly spaced")
    parser.add_argument("--only", nargs="*", help="names of members; all of them when left out")
    arguments = parser.parse_args()

    base = yaml.safe_load((HERE / "base.yaml").read_text(encoding="utf-8"))
    steps = arguments.steps or base["run"]["steps"]
    held_out = write_held_out(
        arguments.data, arguments.out / "held-out", base["model"]["image_size"], arguments.pictures
    )
    members = yaml.safe_load((HERE / "members.yaml").read_text(encoding="utf-8"))
    reports = {}
    for member in members:
        if arguments.only and member["name"] not in arguments.only:
            continue
        folder = arguments.out / member["name"]
        recipe = write_recipe(base, member, folder, arguments.data, steps)
        reports[member["label"]] = measure(train(recipe), held_out, arguments.clip, folder / "figures.json", steps)
    table = markdown(reports)
    (arguments.out / "table.md").write_text(table, encoding="utf-8")
    save_png(grid(reports, held_out), arguments.out / "family.png")
    print(table)


def write_held_out(data: Path, folder: Path, size: int, number: int) -> Path:
    """Some images of every split but train, at the size of the models, so that each is read and scaled once."""
    if (folder / "metadata.jsonl").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    train = {item.path for item in read_items(data, "train")}
    paths = [item.path for item in read_items(data) if item.path not in train]
    paths = [paths[i] for i in torch.linspace(0, len(paths) - 1, min(number, len(paths))).long().tolist()]
    names = [f"{place:04d}.png" for place in range(len(paths))]
    for name, path in zip(names, paths, strict=True):
        fit(open_image(path), size).save(folder / name)  # data: `save_png` would mark it as what a model made
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": name}) + "\n" for name in names), encoding="utf-8"
    )
    return folder


def write_recipe(base: dict[str, Any], member: dict[str, Any], folder: Path, data: Path, steps: int) -> Path:
    """The whole recipe of a member, beside its run."""
    changes = json.loads(json.dumps(member["changes"]).replace('"{steps}"', str(steps)))
    model = base["model"] | {
        "bottleneck": changes["bottleneck"],
        "trunk": base["model"]["trunk"] | changes.get("trunk", {}),
    }
    run = base["run"] | {"output": str(folder / "run"), "steps": steps}
    recipe = base | {"data": {"folder": str(data)}, "model": model, "run": run}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def measure(model: Path, held_out: Path, clip: Path, path: Path, steps: int) -> dict[str, Any]:
    """The figures of a trained member, from `path` where they are written already."""
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["steps"] == steps:
            return found
    tokenizer = Autoencoder.from_pretrained(model)
    parameters = sum(p.numel() for p in tokenizer.parameters())
    report = evaluate(model, held_out, clip=clip) | {"steps": steps, "parameters": parameters, **size(tokenizer)}
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def size(tokenizer: Autoencoder) -> dict[str, Any]:
    """Codes and bits of an image; a continuous one has numbers instead."""
    if tokenizer.continuous:
        side = tokenizer.image_size // tokenizer.factor
        return {"codes": f"{side * side * tokenizer.config.trunk.decoder_dim} numbers", "bits": "-"}
    codes = math.prod(tokenizer.code_shape)
    return {"codes": str(codes), "bits": f"{codes * math.log2(tokenizer.codebook_size):.0f}"}


def markdown(reports: dict[str, dict[str, Any]]) -> str:
    """One row a member."""
    rows = [["", "codes", "bits", *COLUMNS], ["--"] * (len(COLUMNS) + 3)]
    for label, report in reports.items():
        figures = [shape.format(report[key]) if key in report else "-" for key, shape in COLUMNS.values()]
        rows.append([label, report["codes"], report["bits"], *figures])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


@torch.inference_mode()
def grid(reports: dict[str, dict[str, Any]], held_out: Path, scale: int = 2) -> Image.Image:
    """A column for the images and one for each member, the same images in all."""
    first = Autoencoder.from_pretrained(next(iter(reports.values()))["model"])
    data = ImageFolder(held_out, first.image_size)
    chosen = torch.linspace(0, len(data) - 1, SHOWN).long().tolist()
    images = torch.stack([data.read(i) for i in chosen])
    columns = {"picture": images}
    for label, report in reports.items():
        tokenizer = Autoencoder.from_pretrained(report["model"])
        columns[label] = tokenizer.decode_latents(tokenizer.encode_latents(images))
    side, line = first.image_size * scale, 30
    sheet = Image.new("RGB", (len(columns) * (side + 4), line + SHOWN * (side + 4)), "#e8e8e8")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for column, (label, pictures) in enumerate(columns.items()):
        draw.multiline_text((column * (side + 4) + 2, 2), label.replace(", ", ",\n"), fill="black", font=font)
        for row, picture in enumerate(to_pil(pictures)):
            enlarged = picture.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (column * (side + 4) + 2, line + row * (side + 4)))
    return sheet


if __name__ == "__main__":
    main()
