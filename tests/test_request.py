"""`Request`: every field out of range is one sentence; a dump is the same request; keywords and signature agree."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import TextToImagePipeline
from pipelines.conditions import ClassLabel, NoPrompt, SegmentationMap
from pipelines.record import read_record
from pipelines.replay import replay
from pipelines.request import LARGEST_SEED, Request, TextPrompt, keywords
from stage2_prior import Sampling
from tessera.errors import InputError
from tessera.images import open_image, to_tensor

GOLDEN = Path(__file__).parent / "golden" / "release_0_1"
OUT_OF_RANGE: list[tuple[dict[str, Any], str]] = [
    ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number of at least 1, got 0"),
    ({"num_images_per_prompt": 2.0}, "num_images_per_prompt must be a whole number"),
    ({"num_candidates": 0}, "num_candidates must be a whole number of at least 1, got 0"),
    ({"num_candidates": True}, "num_candidates must be a whole number"),
    ({"num_candidates": "4"}, "num_candidates must be a whole number of at least 1, got '4'"),
    ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ({"seed": LARGEST_SEED}, "the seeds of 16 candidates from 9,007,199,254,740,991 on go beyond"),
    ({"seeds": []}, "seeds must be at least one number"),
    ({"seeds": [1, -1]}, "each of seeds must be a whole number of at least 0, got -1"),
    ({"seeds": [LARGEST_SEED + 1]}, "seeds must be at least one number of at most"),
    ({"seeds": 3}, "seeds must be whole numbers, got int"),
    ({"temperature": 0}, "sampling: temperature: Input should be greater than 0, got 0"),
    ({"temperature": float("nan")}, "temperature must be a finite number, got nan"),
    ({"temperature": "hot"}, "sampling: temperature: .* got 'hot'"),
    ({"top_k": -1}, "sampling: top_k: Input should be greater than or equal to 1, got -1"),
    ({"top_p": 0}, "sampling: top_p: Input should be greater than 0, got 0"),
    ({"top_p": 1.5}, "sampling: top_p: Input should be less than or equal to 1, got 1.5"),
    ({"min_p": 2}, "sampling: min_p: Input should be less than or equal to 1, got 2"),
    ({"guidance_scale": -1}, "sampling: guidance_scale: Input should be greater than or equal to 0, got -1"),
    ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number, got inf"),
    ({"guidance_schedule": "steep"}, "sampling: guidance_schedule: .* got 'steep'"),
    ({"plausibility": 1.5}, "sampling: plausibility: Input should be less than or equal to 1, got 1.5"),
    ({"sampling": 3}, "sampling: .* got 3"),
    ({"negative_prompt": "!!"}, "the negative prompt '!!' has no letter or digit"),
    ({"negative_prompt": 5}, "a negative prompt must be text, got int"),
    ({"first_codes": [0.5]}, r"first_codes must be \(n,\) whole numbers, got \(1,\) of torch.float32"),
    ({"first_codes": ["a"]}, "first_codes must be whole numbers"),
    ({"first_codes": torch.zeros(2, 2, dtype=torch.int64)}, r"first_codes must be \(n,\) whole numbers, got \(2, 2\)"),
    ({"known_codes": [True]}, r"known_codes must be \(n,\) whole numbers, got \(1,\) of torch.bool"),
    ({"first_codes": [1], "known_codes": [1, -1]}, "known_codes say of every code whether it is given"),
    ({"rerank": "perhaps"}, "rerank: .* got 'perhaps'"),
    ({"likelihood_weight": -0.1}, "likelihood_weight must be a finite number from 0 on, got -0.1"),
    ({"likelihood_weight": float("inf")}, "likelihood_weight must be a finite number from 0 on, got inf"),
    ({"candidate_budget": 0}, "candidate_budget must be above 0 and at most 1, got 0"),
    ({"candidate_budget": 1.5}, "candidate_budget must be above 0 and at most 1, got 1.5"),
    ({"prune_by": "taste"}, "prune_by must be 'likelihood' or 'reranker', got 'taste'"),
    ({"log_probs": "many"}, "log_probs: .* got 'many'"),
    ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
    ({"plausability": 0.1}, "there is no setting 'plausability', did you mean 'plausibility'"),
    ({"prompts": ["a dog"]}, "there is no setting 'prompts'"),
]
WRONG_PROMPTS: list[tuple[Any, str]] = [
    ("", "the prompt is empty; say what the image should show"),
    ("\u200b", "the prompt holds nothing that can be seen"),
    ("?!", "the prompt '\\?!' has no letter or digit"),
    ("a\0b", "looks like binary data, it has the character U\\+0000"),
    ("a \udcff", "looks like binary data"),
    ("x" * 40_000, "the prompt has 40,000 characters, at most 32,000 are read"),
    ([], "there are no prompts; give at least one"),
    (5, "a prompt must be text, got int"),
    (["a dog", 5], "prompt 2 of 2: a prompt must be text, got int"),
    (["a dog", " "], "prompt 2 of 2: the prompt is empty"),
]


@pytest.mark.parametrize("settings, sentence", OUT_OF_RANGE)
def test_a_field_out_of_range_is_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=f"^{sentence}") as caught:
        Request.make("a dog", **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt, sentence", WRONG_PROMPTS)
def test_a_prompt_that_says_nothing_is_one_sentence(prompt: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Request.make(prompt)


def test_every_setting_has_a_wrong_value_above() -> None:
    tried = {name for settings, _ in OUT_OF_RANGE for name in settings}
    assert set(keywords()) <= tried


def test_more_images_than_candidates_are_refused() -> None:
    with pytest.raises(InputError, match="num_images_per_prompt must be at most num_candidates 2, got 3"):
        Request.make("a dog", num_images_per_prompt=3, num_candidates=2).kept(2)
    with pytest.raises(InputError, match="the candidate_budget finishes 1 of 2 candidates, but .* is 2"):
        Request.make("a dog", num_images_per_prompt=2, num_candidates=2, candidate_budget=0.5).kept(1)


def test_a_missing_map_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.png does not exist; give the file of a segmentation map"):
        SegmentationMap(tmp_path / "none.png")


def test_a_dump_is_the_same_request(tmp_path: Path) -> None:
    (tmp_path / "map.png").write_bytes(b"")
    request = Request.make(
        ["a dog", ClassLabel(3), ClassLabel("owl"), NoPrompt(), SegmentationMap(tmp_path / "map.png")],
        seeds=range(3), top_k=5, min_p=0, first_codes=torch.tensor([1, 2]), candidate_budget=0.5,
    )  # fmt: skip
    again = Request.validated(json.loads(json.dumps(request.model_dump(mode="json"))))
    assert again == request and hash(str(again)) == hash(str(request))
    assert [str(prompt) for prompt in again.prompts] == ["a dog", "class 3", "class owl", "no condition",
                                                         "segmentation map.png"]  # fmt: skip
    assert again.candidate_seeds == (0, 1, 2)
    assert again.sampled_with(Sampling(min_p=0.5, temperature=2.0)) == Sampling(top_k=5, temperature=2.0)


def test_a_request_in_place_of_keywords_gives_the_same_images(tiny_pipeline: TextToImagePipeline) -> None:
    settings: dict[str, Any] = {"num_candidates": 3, "seed": 5, "top_k": 7, "negative_prompt": "a dog"}
    request = Request.make(["a cat", TextPrompt("a red heart")], **settings)
    by_keywords, by_request = tiny_pipeline(["a cat", "a red heart"], **settings), tiny_pipeline(request)
    assert torch.equal(by_keywords.codes, by_request.codes) and by_keywords.seeds == by_request.seeds
    with pytest.raises(InputError, match="a Request has all settings; leave seed out"):
        tiny_pipeline(request, seed=3)


def test_the_signature_shows_every_setting() -> None:
    for method in (TextToImagePipeline.__call__, TextToImagePipeline.stream):
        parameters = inspect.signature(method).parameters
        assert [*parameters] == ["self", "prompt", "progress", *keywords()]
        assert parameters["num_candidates"].default == 16 and parameters["plausibility"].default is None


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_an_image_of_release_0_1_replays(name: str, tmp_path: Path) -> None:
    """Its settings stood beside the prompt; pixels may differ by another processor's rounding, not more."""
    record = read_record(GOLDEN / f"{name}.png")
    if name == "everything":
        sampling = record.request.sampling
        assert sampling is not None and (sampling.top_k, sampling.min_p, sampling.guidance_scale) == (50, 0.01, 2.0)
        assert record.request.negative_prompt == "a dog" and record.precision == "int8"
        assert record.request.first_codes is not None and len(record.request.first_codes) == 64
    replayed = replay(GOLDEN / f"{name}.png", tmp_path, device="cpu")
    before, again = (to_tensor(open_image(path)) for path in (GOLDEN / f"{name}.png", replayed.path))
    assert replayed.identical or float((before - again).abs().mean()) < 0.1
    assert read_record(Path(replayed.path)) == record
