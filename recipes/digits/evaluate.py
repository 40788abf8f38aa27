"""Are drawn digits what was asked for? An independent classifier names them.

    python recipes/digits/evaluate.py runs/digits/bundle_gpt --sheet recipes/digits/gpt.png

The judge is a support vector machine trained on the real digits of the split `test`, which the models never saw. Its
share on the models' own training digits, plain and through the image tokenizer, is the most that can be hoped for.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.svm import SVC

from pipelines import TextToImagePipeline
from tessera.data.source import ImageFolder
from tessera.images import contact_sheet, to_pil


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw digits and let a classifier name them.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data/digits"))
    parser.add_argument("--each", type=int, default=100, help="drawn digits of each class (default: 100)")
    parser.add_argument("--sheet", type=Path, help="write the first eight of each class as a PNG")
    arguments = parser.parse_args()
    pipeline = TextToImagePipeline.from_pretrained(arguments.bundle)
    train, test = (ImageFolder(arguments.data, 8, split) for split in ("train", "test"))
    judge = SVC(gamma=0.001).fit(pixels(pictures(test)), labels(test))
    real = pictures(train)
    images = torch.stack([train.read(i) for i in range(len(train))])
    seen = to_pil(pipeline.image_tokenizer.decode(pipeline.image_tokenizer.encode(images)))

    right, shown = {}, []
    for digit in range(10):
        drawn = pipeline(f"class {digit}", num_candidates=arguments.each, num_images_per_prompt=arguments.each).images
        right[str(digit)] = float((judge.predict(pixels(drawn)) == digit).mean())
        shown += drawn[:8]
    if arguments.sheet:
        contact_sheet(shown, [str(i // 8) for i in range(len(shown))], columns=16, scale=6).save(arguments.sheet)
    report = {
        "bundle": str(arguments.bundle),
        "named_as_asked": round(float(np.mean(list(right.values()))), 4),
        "by_class": right,
        "of_real_digits": round(float((judge.predict(pixels(real)) == labels(train)).mean()), 4),
        "of_real_digits_through_the_tokenizer": round(float((judge.predict(pixels(seen)) == labels(train)).mean()), 4),
    }
    print(json.dumps(report, indent=2))
    return 0


def pictures(data: ImageFolder) -> list[Image.Image]:
    return [Image.open(item.path).convert("RGB") for item in data.items]


def labels(data: ImageFolder) -> NDArray[np.int64]:
    return np.array([int(item.label) for item in data.items])


def pixels(images: list[Image.Image]) -> NDArray[np.float64]:
    """Images -> (n, 64), values 0 to 16 as in the data set."""
    return np.stack([np.asarray(image.convert("L"), dtype=np.float64).ravel() * (16 / 255) for image in images])


if __name__ == "__main__":
    sys.exit(main())
