"""The evaluation with a pretended pipeline: rates, reranking, resuming and what is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from pipelines.evaluate import choose, evaluate_pipeline, table
from tessera.errors import InputError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes" / "emoji"))

from judge import Case, Judge, Region  # noqa: E402

SHAPES = {"disc": (200, 30, 30), "ring": (30, 30, 200), "square": (20, 120, 40), "bar": (90, 60, 30)}
WHOLE, LEFT, RIGHT = (0.0, 0.0, 1.0, 1.0), (0.0, 0.25, 0.5, 0.75), (0.5, 0.25, 1.0, 0.75)
CANDIDATES = 4


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    folder = tmp_path_factory.mktemp("references")
    lines = []
    for shape, colour in SHAPES.items():
        picture = Image.new("RGBA", (136, 136))
        pen = ImageDraw.Draw(picture)
        match shape:
            case "disc":
                pen.ellipse((20, 20, 116, 116), fill=(*colour, 255))
            case "ring":
                pen.ellipse((20, 20, 116, 116), outline=(*colour, 255), width=20)
            case "square":
                pen.rectangle((30, 30, 106, 106), fill=(*colour, 255))
            case _:
                pen.rectangle((10, 55, 126, 80), fill=(*colour, 255))
        picture.save(folder / f"{shape}.png")
        concept = "round" if shape in ("disc", "ring") else shape
        lines.append(json.dumps({"file_name": f"{shape}.png", "item": shape, "concept": concept, "name": shape}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "colours.json").write_text(json.dumps({"white": [255, 255, 255], "yellow": [255, 220, 55]}))
    return Judge(folder)


def region(shape: str, box: tuple[float, float, float, float] = WHOLE) -> Region:
    return Region(box, shape, "round" if shape in ("disc", "ring") else shape)


CASES = [
    *(Case(shape, "seen", (region(shape),), None) for shape in SHAPES),
    Case("square on a yellow background", "background", (region("square"),), "yellow"),
    Case("disc next to bar", "pair", (region("disc", LEFT), region("bar", RIGHT)), None),
    Case("环", "seen_zh", (region("ring"),), None),
]


class Pretended:
    """Draws what is asked as candidate 2; the others are blank, or for `mistaken` prompts another thing."""

    def __init__(self, judge: Judge, mistaken: dict[str, Case] | None = None, preferred: int = 2) -> None:
        self.judge, self.mistaken, self.preferred = judge, mistaken or {}, preferred
        self.prompts: list[str] = []

    def __call__(self, prompts: list[str], seed: int) -> tuple[Tensor, Tensor]:
        images = torch.ones(len(prompts), CANDIDATES, 3, 64, 64)
        for row, prompt in enumerate(prompts):
            request = self.mistaken.get(prompt) or next(r for r in CASES if r.prompt == prompt)
            picture = np.array(self.judge.asked_for(request, 64))
            images[row, 2] = torch.from_numpy(picture).permute(2, 0, 1) / 127.5 - 1
        scores = torch.zeros(len(prompts), CANDIDATES)
        scores[:, self.preferred] = 1.0
        scores[:, 0] = torch.nan
        self.prompts += prompts
        return images, scores


def test_rates_of_a_pipeline_that_is_right_once_in_four(judge: Judge, tmp_path: Path) -> None:
    evaluation = evaluate_pipeline(Pretended(judge), CASES, judge, tmp_path, batch_size=3)
    assert list(evaluation.splits) == ["seen", "background", "pair", "seen_zh"]
    for rates in evaluation.splits.values():
        assert (rates.exact_best, rates.exact_mean, rates.exact_oracle) == (1.0, 0.25, 1.0)
    assert evaluation.splits["seen"].prompts == 4
    assert not list(tmp_path.glob("failures*"))
    assert "best of 4" in table(evaluation)


def test_a_bad_reranker_loses_what_the_oracle_keeps(judge: Judge, tmp_path: Path) -> None:
    evaluation = evaluate_pipeline(Pretended(judge, preferred=1), CASES, judge, tmp_path)
    rates = evaluation.splits["seen"]
    assert (rates.exact_best, rates.exact_mean, rates.exact_oracle) == (0.0, 0.25, 1.0)
    with Image.open(tmp_path / "failures_seen.png") as sheet:
        assert sheet.width > 4 * 128
    assert (tmp_path / "failures_seen_zh.png").exists()


def test_concepts_pairs_and_backgrounds(judge: Judge, tmp_path: Path) -> None:
    mistaken = {
        "disc": CASES[1],  # a ring is round as well
        "square on a yellow background": CASES[2],  # the square, on white
        "disc next to bar": CASES[5]._replace(regions=(region("disc", LEFT), region("ring", RIGHT))),
    }
    splits = evaluate_pipeline(Pretended(judge, mistaken), CASES, judge, tmp_path).splits
    assert (splits["seen"].exact_best, splits["seen"].concept_best) == (0.75, 1.0)
    assert splits["background"].exact_oracle == splits["background"].concept_oracle == 0.0
    assert splits["pair"].exact_best == splits["pair"].concept_best == 0.0


def test_an_interrupted_evaluation_goes_on(judge: Judge, tmp_path: Path) -> None:
    whole = evaluate_pipeline(Pretended(judge), CASES, judge, tmp_path / "whole", batch_size=2)

    class Interrupted(Pretended):
        def __call__(self, prompts: list[str], seed: int) -> tuple[Tensor, Tensor]:
            if len(self.prompts) >= 4:
                raise KeyboardInterrupt
            return super().__call__(prompts, seed)

    with pytest.raises(KeyboardInterrupt):
        evaluate_pipeline(Interrupted(judge), CASES, judge, tmp_path / "cut", batch_size=2)
    log = tmp_path / "cut" / "prompts.jsonl"
    log.write_text(log.read_text() + '{"number": 4, "spl')  # killed while writing a line
    second = Pretended(judge)
    resumed = evaluate_pipeline(second, CASES, judge, tmp_path / "cut", batch_size=2)
    assert second.prompts == [request.prompt for request in CASES[4:]]
    assert resumed.splits == whole.splits
    again = Pretended(judge)
    assert evaluate_pipeline(again, CASES, judge, tmp_path / "cut").images_per_second is None
    assert again.prompts == []


def test_other_settings_are_refused(judge: Judge, tmp_path: Path) -> None:
    evaluate_pipeline(Pretended(judge), CASES[:1], judge, tmp_path, settings={"temperature": 1.0})
    with pytest.raises(InputError, match="other settings"):
        evaluate_pipeline(Pretended(judge), CASES[:1], judge, tmp_path, settings={"temperature": 0.5})
    with pytest.raises(InputError, match="other seed, prompts"):
        evaluate_pipeline(Pretended(judge), CASES, judge, tmp_path, settings={"temperature": 1.0}, seed=1)


def test_limit_takes_evenly_from_every_split() -> None:
    assert choose(CASES, 2) == [0, 2, 4, 5, 6]
    assert choose(CASES, None) == list(range(len(CASES)))


def test_wrong_input(judge: Judge, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 1"):
        evaluate_pipeline(Pretended(judge), CASES, judge, tmp_path, limit=0)
    with pytest.raises(InputError, match="no prompts"):
        evaluate_pipeline(Pretended(judge), [], judge, tmp_path)
    with pytest.raises(InputError, match="no reference of, 'star' first"):
        evaluate_pipeline(Pretended(judge), [Case("x", "s", (region("star"),), None)], judge, tmp_path)
    assert not list(tmp_path.iterdir())
