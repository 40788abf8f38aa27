"""Does a drawn image have the map that was asked for? It is segmented again, by its colours alone, and compared.

    python recipes/segmentation/evaluate.py runs/segmentation/bundle --sheet recipes/segmentation/images.png

Asked are maps of held-out glyphs. What the same measure says of the glyphs' real images, and of these through the
image tokenizer, is the most that can be hoped for; what it says of a drawing for another map is chance.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from labels import BACKGROUND, label_map, label_picture
from numpy.typing import NDArray
from PIL import Image

from pipelines import TextToImagePipeline
from pipelines.conditions import SegmentationMap
from tessera.data.source import ImageFolder
from tessera.images import contact_sheet, to_pil


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw from maps, segment what was drawn, and compare.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data/segmentation"))
    parser.add_argument("--maps", type=int, default=100, help="held-out maps, evenly spaced (default: 100)")
    parser.add_argument("--sheet", type=Path, help="write maps, drawings and real pictures as a PNG")
    arguments = parser.parse_args()
    pipeline = TextToImagePipeline.from_pretrained(arguments.bundle)
    data = ImageFolder(arguments.data, pipeline.image_tokenizer.image_size, "test")
    chosen = np.linspace(0, len(data) - 1, min(arguments.maps, len(data))).astype(int).tolist()
    paths = [path for path in (data.items[i].segmentation for i in chosen) if path is not None]
    images = torch.stack([data.read(i) for i in chosen])
    real, drawn = to_pil(images), pipeline([SegmentationMap(path) for path in paths], num_candidates=1).images
    through = to_pil(pipeline.image_tokenizer.decode(pipeline.image_tokenizer.encode(images)))

    maps = [Image.open(path).convert("RGB") for path in paths]
    asked = np.stack([label_map(one) for one in maps])
    found = {
        "drawn": labels(drawn),
        "real": labels(real),
        "real_through_the_tokenizer": labels(through),
        "drawn_for_another_map": np.roll(labels(drawn), len(drawn) // 2, axis=0),
    }
    if arguments.sheet:
        rows = [(maps[i], drawn[i], real[i]) for i in range(0, len(maps), max(1, len(maps) // 20))][:20]
        shown = [picture for row in rows for picture in row]
        contact_sheet(shown, ["map", "drawn", "real"] * len(rows), columns=15, scale=2).save(arguments.sheet)
    report = {
        "bundle": str(arguments.bundle),
        "maps": len(maps),
        "pixels": {name: round(float((one == asked).mean()), 4) for name, one in found.items()},
        "pixels_of_glyphs": {
            name: round(float((one == asked)[asked != BACKGROUND].mean()), 4) for name, one in found.items()
        },
    }
    print(json.dumps(report, indent=2))
    return 0


def labels(images: list[Image.Image]) -> NDArray[np.int64]:
    return np.stack([label_picture(image) for image in images])


if __name__ == "__main__":
    sys.exit(main())
