"""What weights of less precision change of what a prior draws on a CPU: agreement with float32 on given prompts.

    python benchmarks/precision.py --model emoji

Every prompt is drawn in float32 with the bundle's own sampling settings. Along those codes, unguided, the engine's
logits in each precision are compared with float32's; then the same seeds are drawn again in that precision.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from pipelines import TextToImagePipeline
from stage2_prior.sampling import Engine, make_engine, sample
from stage2_prior.sampling.kernels import KINDS

PROMPTS = (
    "red heart",
    "woman astronaut with medium-dark skin tone",
    "a cat face on a blue background",
    "a guitar above a rocket",
)
FIGURES = ("divergence", "likeliest", "codes", "images", "loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--images", type=int, default=16, help="of each prompt")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pipeline = TextToImagePipeline.from_pretrained(arguments.model)
    prior, seeds = pipeline.prior, range(arguments.images)

    figures = {precision: dict.fromkeys(FIGURES, 0.0) for precision in KINDS}
    engines = {precision: make_engine(prior, precision) for precision in (None, *KINDS)}
    for prompt in arguments.prompts:
        prefix = pipeline.prefixes([prompt])
        codes = sample(prior, prefix, seeds, pipeline.sampling, engine=engines[None])
        wanted = log_probabilities(engines[None], prefix, codes)
        for precision, own in figures.items():
            found = log_probabilities(engines[precision], prefix, codes)
            same = sample(prior, prefix, seeds, pipeline.sampling, engine=engines[precision]) == codes
            values = (
                (wanted.exp() * (wanted - found)).sum(-1).mean(),
                (wanted.argmax(-1) == found.argmax(-1)).double().mean(),
                same.double().mean(),
                same.all(1).double().mean(),
                -found.gather(-1, codes.unsqueeze(-1)).mean(),
            )
            for name, value in zip(FIGURES, values, strict=True):
                own[name] += float(value) / len(arguments.prompts)

    heads = ("KL, nats a code", "same likeliest", "same codes", "same images", "nats a code")
    print(f"{'':9}" + "".join(f"{head:>16}" for head in heads))
    for precision, row in figures.items():
        print(
            f"{precision:9}{row['divergence']:16.5f}{row['likeliest']:16.2%}{row['codes']:16.1%}"
            f"{row['images']:16.1%}{row['loss']:16.4f}"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


@torch.inference_mode()
def log_probabilities(engine: Engine, prefix: Tensor, codes: Tensor) -> Tensor:
    """(N, T, K) of what the engine expects before each of the codes (N, T)."""
    logits, cache = engine.prefill(prefix, codes.shape[1] - 1)
    cache = cache.repeat(torch.zeros(len(codes), dtype=torch.long))
    steps = [logits.expand(len(codes), -1)]
    steps += [engine.step(codes[:, position], cache) for position in range(codes.shape[1] - 1)]
    return torch.stack(steps, dim=1).double().log_softmax(-1)


if __name__ == "__main__":
    main()
