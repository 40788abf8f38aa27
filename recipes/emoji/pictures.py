"""The image of the README: for each prompt the best of 16 candidates as the shipped bundle ranks them, none picked.

    python recipes/emoji/images.py recipes/emoji/images.png

Prints the prompts with the seeds of their images, row by row.
"""

import sys
from pathlib import Path

from pipelines import TextToImagePipeline
from tessera.images import contact_sheet

PROMPTS = [
    "red heart",
    "grinning face",
    "woman firefighter medium-dark skin tone",
    "flag of Japan",
    "a sunflower",
    "green heart",  # a held-out colour
    "a pizza on a blue background",
    "a small skull in the top left corner",
    "a red heart above a blue circle",
    "a cat face left of a rocket",
    "苹果",
    "绿色背景上的老虎头",
]


def main(path: Path, model: str = "emoji") -> None:
    pipeline = TextToImagePipeline.from_pretrained(model)
    result = pipeline(PROMPTS, num_images_per_prompt=1, num_candidates=16, seed=0)
    labels = [f"{number}" for number in range(1, len(PROMPTS) + 1)]
    contact_sheet(result.images, labels, columns=6, scale=2).save(path)
    for number, (prompt, seed) in enumerate(zip(PROMPTS, result.seeds, strict=True), 1):
        print(f"{number} {prompt} ({seed})")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
