"""Before (above) and after (below): for each prompt the best of 4 candidates as the reranker orders them, none picked.

python recipes/lora_subject/images.py recipes/lora_subject/images.png
"""

import sys
from pathlib import Path

from pipelines import TextToImagePipeline
from tessera.images import contact_sheet

LORA = "runs/lora_subject/lora/model"
PROMPTS = [
    "a tessie",
    "a tessie on a red background",
    "a tessie on a blue background",  # never shown
    "a small tessie in the top left corner",
    "a small tessie in the bottom right corner",  # never shown
    "a drawing of a tessie",  # never shown
    "red heart",
    "grinning face",
]


def main(path: Path, lora: str = LORA, model: str = "emoji") -> None:
    pipeline = TextToImagePipeline.from_pretrained(model)
    images = []
    for folder in (None, lora):
        if folder is not None:
            pipeline.load_lora_weights(folder)
        images += pipeline(PROMPTS, num_images_per_prompt=1, num_candidates=4, seed=0).images
    labels = [f"{number}" for number in range(1, len(PROMPTS) + 1)]
    contact_sheet(images, labels * 2, columns=len(PROMPTS), scale=2).save(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
