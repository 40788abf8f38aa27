"""How often does a pipeline generate what was asked? Measured by a judge that the recipe of a world brings along.

For every prompt the pipeline samples N candidates and scores them; the judge says of each whether it shows what was
asked for exactly, or at least its concept. Per split of the prompts, three rates each:

    best    of the candidate that the reranker puts first: what a user gets
    mean    over all candidates: what a user would get without reranking
    oracle  prompts with at least one right candidate: what a perfect reranker would reach

Finished prompts are kept in OUT/prompts.jsonl as they come, and an interrupted evaluation resumes from there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tessera.errors import InputError
from tessera.files import parse_json, read_text
from tessera.images import contact_sheet, open_image, save_png, to_pil
from tessera.paths import is_file
from tessera.weights.writing import write_json, write_text

# (prompts, seed) -> images (P, N, 3, H, W), uint8 or float in [-1, 1], and scores (P, N), higher fits better. What it
# draws for a prompt must not depend on the other prompts of the batch.
Draw = Callable[[list[str], int], tuple[Tensor, Tensor]]

FAILURES_SHOWN = 24  # per split


class Case(Protocol):
    """A line of an evaluation: a prompt, and whatever else its judge must know."""

    @property
    def prompt(self) -> str: ...
    @property
    def split(self) -> str: ...


class Seen(Protocol):
    @property
    def item(self) -> str | None: ...


class Verdict(Protocol):
    @property
    def exact(self) -> bool: ...
    @property
    def concept(self) -> bool: ...
    @property
    def seen(self) -> Sequence[Seen]: ...


C = TypeVar("C", bound=Case)
J = TypeVar("J", bound=Case, contravariant=True)


class Judge(Protocol[J]):
    """Says whether images show what a case asks for, independently of all models that are judged."""

    @property
    def items(self) -> Sequence[str]:
        """What it knows; an evaluation that was begun with more or fewer is not resumed."""

    def check(self, cases: Sequence[J]) -> None:
        """Raises InputError for cases that it cannot judge."""

    def __call__(self, images: Tensor, case: J) -> Sequence[Verdict]:
        """(N, 3, H, W), uint8 or float in [-1, 1] -> one verdict for each."""

    def asked_for(self, case: J, size: int) -> Image.Image:
        """What would have been right, for the sheet of failures."""

    def label(self, case: J) -> str:
        """What stands below it there."""


class Outcome(NamedTuple):
    """What became of one prompt."""

    number: int  # of the prompt in the whole list
    split: str
    exact: list[bool]  # candidate by candidate
    concept: list[bool]
    best: int  # the candidate that the scores put first
    seen: list[str | None]  # what the judge saw in the best one, part by part


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
    cases: Sequence[C],
    judge: Judge[C],
    out: str | Path,
    *,
    settings: dict[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    limit: int | None = None,
) -> Evaluation:
    """Draw and judge every case, or `limit` of each split, evenly spaced.

    `out` receives prompts.jsonl, evaluation.json, and failures_SPLIT.png: the best candidate beside what was asked, for
    prompts whose best candidate is not exact. `settings` says how the images are drawn (weights, sampling); a folder
    that was begun with other settings, prompts, seed or judge is refused.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise InputError(f"batch_size and limit must be at least 1, got {batch_size} and {limit}")
    if not cases:
        raise InputError("there are no prompts to evaluate; give a file with at least one line")
    judge.check(cases)
    out = Path(out)
    chosen = choose(cases, limit)
    begun = {"settings": settings or {}, "seed": seed, "prompts": fingerprint(cases), "judge": len(judge.items)}
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
            images, scores = draw([cases[index].prompt for index in batch], seed)
            check_drawn(images, scores, len(batch))
            drawn += images.shape[0] * images.shape[1]
            for index, candidates, row in zip(batch, images, scores, strict=True):
                outcome = judge_candidates(index, cases[index], candidates, row, judge)
                if not outcome.exact[outcome.best]:
                    keep_failure(out, index, cases[index], candidates[outcome.best], judge)
                outcomes[index] = outcome
                log.write(json.dumps(outcome._asdict()) + "\n")
            log.flush()
            bar.update(len(batch))

    rate = drawn / max(time.monotonic() - started, 1e-9) if drawn else None
    evaluation = summarize([outcomes[index] for index in chosen], rate)
    draw_failures(out, cases, [outcomes[index] for index in chosen], judge)
    write_json(out / "evaluation.json", begun | as_json(evaluation))
    return evaluation


def choose(cases: Sequence[Case], limit: int | None) -> list[int]:
    """The indices of up to `limit` cases of each split, evenly spaced, in order."""
    splits: dict[str, list[int]] = {}
    for index, case in enumerate(cases):
        splits.setdefault(case.split, []).append(index)
    chosen: list[int] = []
    for members in splits.values():
        count = len(members) if limit is None else min(limit, len(members))
        chosen += [members[number * len(members) // count] for number in range(count)]
    return sorted(chosen)


def judge_candidates(index: int, case: C, images: Tensor, scores: Tensor, judge: Judge[C]) -> Outcome:
    """`images` (N, 3, H, W) and `scores` (N,) of one case."""
    verdicts = judge(images, case)
    best = int(torch.nan_to_num(scores.float(), nan=-math.inf).argmax())
    return Outcome(
        number=index,
        split=case.split,
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


def fingerprint(cases: Sequence[Case]) -> str:
    text = json.dumps(list(cases), ensure_ascii=False)
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


def keep_failure(out: Path, index: int, case: C, image: Tensor, judge: Judge[C]) -> None:
    """OUT/failures/INDEX.png: what was generated, left of what was asked for; `image` is (3, H, W)."""
    (out / "failures").mkdir(exist_ok=True)
    pixels = image.float() / 127.5 - 1 if image.dtype == torch.uint8 else image.nan_to_num()
    (generated,) = to_pil(pixels[None])
    both = Image.new("RGB", (2 * generated.width + 2, generated.height), "#e8e8e8")
    both.paste(generated, (0, 0))
    both.paste(judge.asked_for(case, generated.width), (generated.width + 2, 0))
    save_png(both, out / "failures" / f"{index:05d}.png")


def draw_failures(out: Path, cases: Sequence[C], outcomes: Sequence[Outcome], judge: Judge[C]) -> None:
    """failures_SPLIT.png for each split that has failures: generated beside asked for, a label underneath."""
    failed: dict[str, list[int]] = {}
    for outcome in outcomes:
        if not outcome.exact[outcome.best]:
            failed.setdefault(outcome.split, []).append(outcome.number)
    for split, indices in failed.items():
        shown = indices[:: -(-len(indices) // FAILURES_SHOWN)]
        images = [open_image(out / "failures" / f"{index:05d}.png") for index in shown]
        labels = [judge.label(cases[index]) for index in shown]
        scale = max(1, 128 // images[0].height)
        save_png(contact_sheet(images, labels, columns=4, scale=scale), out / f"failures_{split}.png")
