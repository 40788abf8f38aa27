"""Speculative Jacobi decoding beside drawing one position a step: steps and time an image.

    python benchmarks/speculation.py --model emoji --windows 2 4 8 16

Ways take turns, image by image; the images of all are the same (the script ends with an error where they are not).
"""

import argparse
import statistics
import time

import torch

from pipelines import TextToImagePipeline
from stage2_prior.sampling import Engine, Sampling, make_engine, sample, sample_speculatively

PROMPTS = ("red heart", "woman astronaut with medium-dark skin tone", "a guitar above a rocket", "红心")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--windows", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--images", type=int, default=1, help="drawn at once")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    pipeline = TextToImagePipeline.from_pretrained(arguments.model)
    own = pipeline.sampling
    plain, greedy = own.model_copy(update={"guidance_scale": 1.0}), Sampling(top_k=1)

    print(f"{'':18} {'one by one':>14}" + "".join(f"{f'window {window}':>14}" for window in arguments.windows))
    for precision in (None, "int8"):
        engine = make_engine(pipeline.prior, precision)
        for name, sampling in {"": plain, ", greedy": greedy, ", guided": own}.items():
            cells = compare(pipeline, engine, sampling, arguments)
            label = f"{precision or 'float32'}{name}"
            print(f"{label:18}" + "".join(f"{f'{steps:.0f}, {1e3 * seconds:.0f} ms':>14}" for steps, seconds in cells))


def compare(
    pipeline: TextToImagePipeline, engine: Engine, sampling: Sampling, arguments: argparse.Namespace
) -> list[tuple[float, float]]:
    """Steps and median seconds an image, one by one and for each window."""
    windows: list[int | None] = [None, *arguments.windows]
    steps: dict[int | None, list[float]] = {window: [] for window in windows}
    seconds: dict[int | None, list[float]] = {window: [] for window in windows}
    for turn in range(arguments.rounds + 1):  # the first one warms up
        for prompt in arguments.prompts:
            prefix = pipeline.prefixes([prompt])
            seeds = range(turn * arguments.images, (turn + 1) * arguments.images)
            for window in windows:
                start = time.perf_counter()
                if window is None:
                    wanted = codes = sample(pipeline.prior, prefix, seeds, sampling, engine=engine)
                    taken = float(pipeline.prior.length // pipeline.prior.num_codebooks)
                else:
                    codes, counts = sample_speculatively(pipeline.prior, prefix, seeds, sampling, window, engine=engine)
                    taken = float(counts.double().mean())
                if not torch.equal(codes, wanted):
                    raise SystemExit(f"window {window} drew another image of {prompt!r}: a mistake in the engine")
                if turn:
                    seconds[window].append((time.perf_counter() - start) / arguments.images)
                    steps[window].append(taken)
    return [(statistics.mean(steps[window]), statistics.median(seconds[window])) for window in windows]


if __name__ == "__main__":
    main()
