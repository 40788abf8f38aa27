"""How often does a pipeline draw what was asked? Measured by a judge that knows every part of the world.

For every prompt the pipeline draws N candidates and scores them; the judge says of each whether it shows the item that
was asked for (exact) or at least its concept, in every region that the prompt names and on the background it names. Per
split of the prompts, three rates each:

    best    of the candidate that the reranker puts first: what a user gets
    mean    over all candidates: what a user would get without reranking
    oracle  prompts with at least one right candidate: what a perfect reranker would reach

Finished prompts are kept in OUT/prompts.jsonl as they come, and an interrupted evaluation goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pipelines.judge import WHITE, Judge, Request, to_pixels
from tessera.errors import InputError
from tessera.files import parse_json, read_text
from tessera.images import contact_sheet, open_image, opened_image, save_png
from tessera.paths import is_file
from tessera.weights.writing import write_json, write_text

# (prompts, seed) -> images (P, N, 3, H, W), uint8 or float in [-1, 1], and scores (P, N), higher fits better. What it
# draws for a prompt must not depend on the other prompts of the batch.
Draw = Callable[[list[str], int], tuple[Tensor, Tensor]]

FAILURES_SHOWN = 24  # per split


class Outcome(NamedTuple):
    """What became of one prompt."""

    number: int  # of the prompt in the whole list
    split: str
    exact: list[bool]  # candidate by candidate
    concept: list[bool]
    best: int  # the candidate that the scores put first
    seen: list[str | None]  # what the judge saw in the best one, region by region


class Rates(NamedTuple):
    """Shares in 0..1 over the prompts of a split."""

    prompts: int
    exact_best: float
    exact_mean: float
    exact_oracle: float
    concept_best: float
    concept_mean: float
    concept_oracle: float


class Evaluation(NamedTuple):
    splits: dict[str, Rates]  # in the order of the prompts
    num_candidates: int
    images_per_second: float | None  # drawing and judging together; None when nothing was left to draw


def evaluate_pipeline(
    draw: Draw,
    requests: Sequence[Request],
    judge: Judge,
    out: str | Path,
    *,
    settings: dict[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    limit: int | None = None,
) -> Evaluation:
    """Draw and judge every request, or `limit` of each split, evenly spaced.

    `out` receives prompts.jsonl, evaluation.json, and failures_SPLIT.png: the best candidate beside what was asked, for
    prompts whose best candidate is not exact. `settings` says how the pictures are drawn (weights, sampling); a folder
    that was begun with other settings, prompts, seed or judge is refused.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise InputError(f"batch_size and limit must be at least 1, got {batch_size} and {limit}")
    if not requests:
        raise InputError("there are no prompts to evaluate; give a file with at least one line")
    unknown = {region.item for request in requests for region in request.regions} - set(judge.items)
    if unknown:
        raise InputError(
            f"the prompts ask for {len(unknown)} items that the judge has no reference of, {min(unknown)!r} first; "
            f"prepare {judge.folder} and the prompts from one font"
        )
    out = Path(out)
    chosen = choose(requests, limit)
    begun = {"settings": settings or {}, "seed": seed, "prompts": fingerprint(requests), "judge": len(judge.items)}
    outcomes = resume(out / "prompts.jsonl", begun)
    pending = [index for index in chosen if index not in outcomes]

    started = time.monotonic()
    drawn = 0
    with (
        (out / "prompts.jsonl").open("a", encoding="utf-8") as log,
        tqdm(total=len(chosen), initial=len(chosen) - len(pending), desc="evaluating", unit="prompt") as bar,
    ):
        for start in range(0, len(pending), batch_size):
            batch = pending[start : start + batch_size]
            images, scores = draw([requests[index].prompt for index in batch], seed)
            check_drawn(images, scores, len(batch))
            drawn += images.shape[0] * images.shape[1]
            for index, candidates, row in zip(batch, images, scores, strict=True):
                outcome = judge_candidates(index, requests[index], candidates, row, judge)
                if not outcome.exact[outcome.best]:
                    keep_failure(out, index, requests[index], candidates[outcome.best], judge)
                outcomes[index] = outcome
                log.write(json.dumps(outcome._asdict()) + "\n")
            log.flush()
            bar.update(len(batch))

    rate = drawn / max(time.monotonic() - started, 1e-9) if drawn else None
    evaluation = summarize([outcomes[index] for index in chosen], rate)
    draw_failures(out, requests, [outcomes[index] for index in chosen], judge)
    write_json(out / "evaluation.json", begun | as_json(evaluation))
    return evaluation


def choose(requests: Sequence[Request], limit: int | None) -> list[int]:
    """The indices of up to `limit` requests of each split, evenly spaced, in order."""
    splits: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        splits.setdefault(request.split, []).append(index)
    chosen: list[int] = []
    for members in splits.values():
        count = len(members) if limit is None else min(limit, len(members))
        chosen += [members[number * len(members) // count] for number in range(count)]
    return sorted(chosen)


def judge_candidates(index: int, request: Request, images: Tensor, scores: Tensor, judge: Judge) -> Outcome:
    """`images` (N, 3, H, W) and `scores` (N,) of one request."""
    verdicts = judge(images, request)
    best = int(torch.nan_to_num(scores.float(), nan=-math.inf).argmax())
    return Outcome(
        number=index,
        split=request.split,
        exact=[verdict.exact for verdict in verdicts],
        concept=[verdict.concept for verdict in verdicts],
        best=best,
        seen=[seen.item for seen in verdicts[best].seen],
    )


def check_drawn(images: Tensor, scores: Tensor, prompts: int) -> None:
    if images.ndim != 5 or len(images) != prompts or scores.shape != images.shape[:2] or images.shape[1] == 0:
        raise ValueError(
            f"draw must give images (P, N, 3, H, W) and scores (P, N) for its {prompts} prompts, "
            f"got {tuple(images.shape)} and {tuple(scores.shape)}"
        )


def summarize(outcomes: Sequence[Outcome], images_per_second: float | None) -> Evaluation:
    splits: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        splits.setdefault(outcome.split, []).append(outcome)
    rates = {
        split: Rates(
            len(members),
            average([o.exact[o.best] for o in members]),
            average([average(o.exact) for o in members]),
            average([any(o.exact) for o in members]),
            average([o.concept[o.best] for o in members]),
            average([average(o.concept) for o in members]),
            average([any(o.concept) for o in members]),
        )
        for split, members in splits.items()
    }
    return Evaluation(rates, len(outcomes[0].exact), images_per_second)


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    return evaluation._asdict() | {"splits": {name: rates._asdict() for name, rates in evaluation.splits.items()}}


def table(evaluation: Evaluation) -> str:
    """The rates in per cent, one row per split."""
    head = f"best of {evaluation.num_candidates}"
    lines = [
        f"{'':12} {'prompts':>8}   {'exact item':^26}   {'concept':^26}",
        f"{'split':12} {'':>8}" + 2 * f"   {head:>10} {'mean':>7} {'oracle':>7}",
    ]
    for split, rates in evaluation.splits.items():
        exact = f"{rates.exact_best:10.1%} {rates.exact_mean:7.1%} {rates.exact_oracle:7.1%}"
        concept = f"{rates.concept_best:10.1%} {rates.concept_mean:7.1%} {rates.concept_oracle:7.1%}"
        lines.append(f"{split:12} {rates.prompts:8}   {exact}   {concept}")
    if evaluation.images_per_second is not None:
        lines.append(f"{evaluation.images_per_second:.1f} images per second, drawn and judged")
    return "\n".join(lines)


def fingerprint(requests: Sequence[Request]) -> str:
    text = json.dumps(list(requests), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def resume(file: Path, begun: dict[str, Any]) -> dict[int, Outcome]:
    """The outcomes that an earlier run left in `file`; a new file gets `begun` as its first line."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {file.parent}: {error.strerror or error}; choose another folder") from None
    if not is_file(file):
        others = [name for name in ("evaluation.json", "failures") if os.path.lexists(file.with_name(name))]
        if others:
            raise InputError(f"{file.with_name(others[0])} was not written by an evaluation; choose another folder")
    lines = read_text(file).split("\n") if is_file(file) else [""]
    whole = lines[:-1]  # what follows the last line end was cut off in the middle
    if not whole and lines[-1] and not lines[-1].startswith("{"):
        raise InputError(f"{file} was not written by an evaluation; choose another folder")
    begun = json.loads(json.dumps(begun))
    if whole:
        remedy = "choose another folder, or delete it"
        earlier = parse_json(whole[0], f"{file}, line 1", remedy)
        if not isinstance(earlier, dict) or not begun.keys() <= earlier.keys():
            raise InputError(f"{file} was not written by an evaluation; {remedy}")
        changed = [key for key in begun if earlier[key] != begun[key]]
        if changed:
            raise InputError(
                f"{file.parent} holds an evaluation with other {', '.join(changed)}; choose another folder or delete it"
            )
    outcomes = [_outcome(line, f"{file}, line {number}") for number, line in enumerate(whole[1:], 2)]
    kept = [json.dumps(begun, ensure_ascii=False), *whole[1:]]
    write_text(file, "".join(line + "\n" for line in kept))
    return {outcome.number: outcome for outcome in outcomes}


def _outcome(line: str, where: str) -> Outcome:
    content = parse_json(line, where, "remove the line")
    try:
        return Outcome(**content)
    except TypeError:
        raise InputError(f"{where} is no outcome of an evaluation; remove the line") from None


def keep_failure(out: Path, index: int, request: Request, image: Tensor, judge: Judge) -> None:
    """OUT/failures/INDEX.png: what was drawn, left of what was asked for; `image` is (3, H, W)."""
    (out / "failures").mkdir(exist_ok=True)
    drawn = Image.fromarray(to_pixels(image[None])[0].permute(1, 2, 0).byte().numpy())
    both = Image.new("RGB", (2 * drawn.width + 2, drawn.height), "#e8e8e8")
    both.paste(drawn, (0, 0))
    both.paste(asked_for(request, drawn.width, judge), (drawn.width + 2, 0))
    save_png(both, out / "failures" / f"{index:05d}.png")


def asked_for(request: Request, size: int, judge: Judge) -> Image.Image:
    """The picture that would have been right, size x size, made of the judge's references."""
    red, green, blue = judge.colours[request.background or WHITE].int().tolist()
    picture = Image.new("RGBA", (size, size), (red, green, blue, 255))
    for region in request.regions:
        left, top, right, _ = (round(edge * size) for edge in region.box)
        with opened_image(judge.files[judge.items.index(region.item)]) as reference:
            glyph = reference.convert("RGBA").resize((right - left, right - left), Image.Resampling.LANCZOS)
        picture.alpha_composite(glyph, (left, top))
    return picture.convert("RGB")


def draw_failures(out: Path, requests: Sequence[Request], outcomes: Sequence[Outcome], judge: Judge) -> None:
    """failures_SPLIT.png for each split that has failures: drawn beside asked for, the prompt underneath."""
    failed: dict[str, list[int]] = {}
    for outcome in outcomes:
        if not outcome.exact[outcome.best]:
            failed.setdefault(outcome.split, []).append(outcome.number)
    for split, indices in failed.items():
        step = -(-len(indices) // FAILURES_SHOWN)
        pictures, labels = [], []
        for index in indices[::step]:
            pictures.append(open_image(out / "failures" / f"{index:05d}.png"))
            request = requests[index]
            drawable = max(request.prompt, default="") < "\u3000"  # the sheet's font has no Chinese
            labels.append(request.prompt if drawable else judge.names[judge.items.index(request.regions[0].item)])
        scale = max(1, 128 // pictures[0].height)
        save_png(contact_sheet(pictures, labels, columns=4, scale=scale), out / f"failures_{split}.png")
