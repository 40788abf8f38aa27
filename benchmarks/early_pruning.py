"""What early pruning costs and saves: the best of N as a judge sees it, over the share of the codes that are drawn.

    python benchmarks/early_pruning.py --references data/emoji/glyphs --splits seen,seen_zh,tone --limit 40

Every candidate is drawn to the end once. Pruning changes no image, it only drops some (a test says so), so what a
budget leaves is worked out from the log-probabilities of the same candidates; the reranker then chooses among those.
Beside the likelihood gain stand dropping by the reranker's score of a filled-in image (--clip, which takes long),
by the prior's plain likelihood, by the plain gain (weight 1 of the null), and at random.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipelines import TextToImagePipeline
from pipelines.evaluate import choose
from pipelines.evaluate_recipe import load_judge
from pipelines.pruning import fill
from stage2_prior import unflatten_codes
from stage2_prior.sampling import Sampler, plan_pruning
from stage2_prior.sampling.prune import NULL_WEIGHT, best_of

BUDGETS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
SHUFFLES = 20  # random orders that are averaged


class Prompt(NamedTuple):
    """All candidates of one prompt."""

    split: str
    exact: Tensor  # (N,) bool
    scores: Tensor  # (N,) that the pipeline orders finished images by
    log_probs: Tensor  # (N, T)
    null_log_probs: Tensor  # (N, T)
    filled: dict[int, Tensor]  # codes there were -> (N,) the reranker's score of the filled-in image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--prompts", type=Path, default=Path("recipes/emoji/prompts.jsonl"))
    parser.add_argument("--judge", type=Path, default=Path("recipes/emoji/judge.py"))
    parser.add_argument("--references", type=Path, required=True, help="The judge's, see recipes/emoji/prepare.py.")
    parser.add_argument("--splits", default="seen,seen_zh,tone")
    parser.add_argument("--limit", type=int, default=40, help="Prompts of each split.")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--clip", action="store_true", help="Also prune by the reranker.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    start = time.perf_counter()
    pipeline = TextToImagePipeline.from_pretrained(arguments.model)
    cases, judge = load_judge(arguments.judge, arguments.prompts, arguments.references)
    cases = [case for case in cases if case.split in arguments.splits.split(",")]
    seeds = range(arguments.seed, arguments.seed + arguments.candidates)
    positions = {
        plan_pruning(arguments.candidates, pipeline.prior.length, budget).position for budget in BUDGETS if budget < 1
    }
    drawn = []
    for index in choose(cases, arguments.limit):
        prefix = pipeline.prefixes([cases[index].prompt])
        sampler = Sampler(pipeline.prior, prefix, seeds, pipeline.sampling, engine=pipeline.engine, scored=True)
        sampler.advance(pipeline.prior.length)
        filled = {
            position: look(pipeline, cases[index].prompt, fill(sampler.codes[:, :position], pipeline.prior.code_shape))[
                1
            ]
            for position in (positions if arguments.clip else ())
        }
        images, scores = look(pipeline, cases[index].prompt, sampler.codes)
        scores = scores + pipeline.likelihood_weight * sampler.log_probs.sum(-1)
        exact = torch.tensor([verdict.exact for verdict in judge(images, cases[index])])
        drawn.append(Prompt(cases[index].split, exact, scores, sampler.log_probs, sampler.null_log_probs, filled))
        print(f"{len(drawn)} prompts, {time.perf_counter() - start:.0f} s", end="\r", flush=True)

    figures = curve(drawn, arguments.candidates, pipeline.prior.length, arguments.clip)
    print_table(figures)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def look(pipeline: TextToImagePipeline, prompt: str, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (N, T) -> images (N, 3, H, W) and the reranker's scores (N,)."""
    grids = unflatten_codes(codes, pipeline.image_tokenizer.code_shape)
    images = torch.cat([pipeline.image_tokenizer.decode(one) for one in grids.split(1)])
    assert pipeline.reranker is not None
    return images, pipeline.reranker.score(prompt, images, grids)


def curve(drawn: list[Prompt], candidates: int, length: int, clip: bool) -> list[dict[str, Any]]:
    """The share of prompts whose best image is exact, for each budget and way of dropping, split by split."""
    rows = []
    for budget in BUDGETS:
        position, survivors = length, candidates
        if budget < 1:
            position, survivors = plan_pruning(candidates, length, budget)
        for way in ("gain", *(("clip",) if clip else ()), "likelihood", "plain gain", "random"):
            if way == "clip" and budget == 1:
                continue
            for split in ("all", *dict.fromkeys(one.split for one in drawn)):
                own = [one for one in drawn if split in ("all", one.split)]
                rates = [rate(one, way, position, survivors, number) for number, one in enumerate(own)]
                share = sum(rates) / len(rates)
                rows.append(
                    {"budget": budget, "looked_at": position, "finished": survivors, "way": way, "split": split}
                    | {"prompts": len(own), "exact": share}
                )
    return rows


def rate(prompt: Prompt, way: str, position: int, survivors: int, number: int) -> float:
    """How often the best of what is left is exact: 0 or 1, or the mean over random orders."""
    likelihood = prompt.log_probs[:, :position].sum(-1)
    null = prompt.null_log_probs[:, :position].sum(-1)
    match way:
        case "gain":
            scores = (likelihood - NULL_WEIGHT * null)[None]
        case "clip":
            scores = prompt.filled[position][None]
        case "likelihood":
            scores = likelihood[None]
        case "plain gain":
            scores = (likelihood - null)[None]
        case _:
            generator = torch.Generator().manual_seed(number)
            scores = torch.rand(SHUFFLES, len(likelihood), generator=generator)
    left = best_of(scores, survivors)  # (1 or SHUFFLES, survivors)
    best = left.gather(-1, prompt.scores[left].argmax(-1, keepdim=True))
    return float(prompt.exact[best].float().mean())


def print_table(figures: list[dict[str, Any]]) -> None:
    splits = list(dict.fromkeys(row["split"] for row in figures))
    full = {row["split"]: row["exact"] for row in figures if row["budget"] == 1 and row["way"] == "gain"}
    print(f"{'budget':>6} {'looked at':>9} {'finished':>8} {'dropped by':11}" + "".join(f"{s:>18}" for s in splits))
    for budget in BUDGETS:
        for way in dict.fromkeys(row["way"] for row in figures if row["budget"] == budget):
            own = {row["split"]: row for row in figures if row["budget"] == budget and row["way"] == way}
            cells = [f"{own[s]['exact']:9.1%} ({own[s]['exact'] / max(full[s], 1e-9):5.0%})" for s in splits]
            first = own[splits[0]]
            print(
                f"{budget:6.3f} {first['looked_at']:9} {first['finished']:8} {way:11}"
                + "".join(f"{cell:>18}" for cell in cells)
            )


if __name__ == "__main__":
    main()
