"""The shipped bundle samples what it sampled before: 200 (prompt, seed) pairs, recorded with release 0.1.0.

The codes depend on the last bits of float32 numbers only where two codes are nearly tied, so that another processor may
move a few images; a change of the design, or another release of torch, moves none.
"""

import json
from pathlib import Path

from safetensors.torch import load_file

from pipelines import TextToImagePipeline

GOLDEN = Path(__file__).parent / "golden"
MOVED = 4  # of 200 images, by another processor's rounding


def test_the_shipped_bundle_samples_the_codes_of_before() -> None:
    prompts = json.loads((GOLDEN / "shipped_prompts.json").read_text("utf-8"))
    expected = load_file(GOLDEN / "shipped_codes.safetensors")["codes"]  # (200, Q, h, w)
    pipeline = TextToImagePipeline.from_pretrained("emoji", device="cpu", rerank=False)
    different = 0
    for i, prompt in enumerate(prompts):
        seeds = [i, 1000 + 7 * i]
        codes = pipeline(prompt, num_images_per_prompt=2, seeds=seeds, rerank=False).codes
        different += int((codes != expected[2 * i : 2 * i + 2]).flatten(1).any(1).sum())
    assert different <= MOVED
