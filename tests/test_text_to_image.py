"""The pipeline: a picture depends on prompt, seed and sampling alone, the best come first, bad input is a sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common.errors import InputError
from common.images import to_pil
from pipelines import text_to_image
from pipelines.text_to_image import Generated, TextToImagePipeline, batches, check_prompt, find_device, free_memory
from rerank import ClipReranker
from stage2_prior import sample, unflatten_codes
from tests.conftest import tiny_prior

PROMPT = "a red heart above a blue circle"


def pixels(generated: Generated) -> list[bytes]:
    return [image.tobytes() for image in generated.images]


# Laws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 0, "top_p": 0.9, "guidance_scale": 1.0}])
def test_n_candidates_equal_n_single_runs(tiny_pipeline: TextToImagePipeline, settings: dict[str, Any]) -> None:
    together = tiny_pipeline(PROMPT, num_images_per_prompt=7, num_candidates=7, seed=3, **settings)
    assert sorted(together.seeds) == list(range(3, 10))
    for image, seed, codes in zip(together.images, together.seeds, together.codes, strict=True):
        alone = tiny_pipeline(PROMPT, num_candidates=1, seed=seed, **settings)
        assert torch.equal(alone.codes[0], codes)
        assert alone.images[0].tobytes() == image.tobytes()
        assert alone.seeds == [seed]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 64])
def test_pictures_do_not_depend_on_the_batch_size(tiny_pipeline: TextToImagePipeline, batch_size: int) -> None:
    prompts = [PROMPT, "a dog", "红心"]
    usual = tiny_pipeline(prompts, num_images_per_prompt=5, num_candidates=5)
    other = tiny_pipeline(prompts, num_images_per_prompt=5, num_candidates=5, batch_size=batch_size)
    assert torch.equal(usual.codes, other.codes) and pixels(usual) == pixels(other) and usual.seeds == other.seeds
    assert torch.allclose(torch.tensor(usual.scores), torch.tensor(other.scores), rtol=0, atol=1e-6)


def test_prompts_do_not_depend_on_each_other(tiny_pipeline: TextToImagePipeline) -> None:
    prompts = ["a dog", PROMPT, "a dog in the top left corner"]
    together = tiny_pipeline(prompts, num_images_per_prompt=2, num_candidates=4)
    assert len(together.images) == len(together.seeds) == len(together.codes) == 6
    for i, prompt in enumerate(prompts):
        alone = tiny_pipeline(prompt, num_images_per_prompt=2, num_candidates=4)
        assert pixels(alone) == pixels(together)[2 * i : 2 * i + 2]
        assert alone.seeds == together.seeds[2 * i : 2 * i + 2]
    assert not torch.equal(together.codes[:2], together.codes[2:4])  # the prompt matters


def test_reranking_orders_and_changes_nothing_else(tiny_pipeline: TextToImagePipeline) -> None:
    ranked = tiny_pipeline(PROMPT, num_images_per_prompt=9, num_candidates=9)
    plain = tiny_pipeline(PROMPT, num_images_per_prompt=9, num_candidates=9, rerank=False)
    assert plain.scores is None and plain.seeds == list(range(9))
    assert [pixels(plain)[seed] for seed in ranked.seeds] == pixels(ranked)
    assert ranked.scores == sorted(ranked.scores or [], reverse=True) and ranked.seeds != plain.seeds

    best = tiny_pipeline(PROMPT, num_images_per_prompt=3, num_candidates=9)
    assert pixels(best) == pixels(ranked)[:3] and best.scores == (ranked.scores or [])[:3]


def test_scores_are_those_of_the_pictures(tiny_pipeline: TextToImagePipeline, tiny_clip: ClipReranker) -> None:
    generated = tiny_pipeline(PROMPT, num_images_per_prompt=6, num_candidates=6)
    images = tiny_pipeline.image_tokenizer.decode(generated.codes)
    assert torch.allclose(torch.tensor(generated.scores), tiny_clip.score(PROMPT, images), rtol=0, atol=1e-5)
    assert torch.allclose(torch.tensor(generated.scores), tiny_clip.score(PROMPT, generated.images), rtol=0, atol=1e-2)


def test_pictures_are_the_sampled_codes_decoded(tiny_pipeline: TextToImagePipeline) -> None:
    """The pipeline against its parts, called one by one."""
    generated = tiny_pipeline(PROMPT, num_images_per_prompt=3, num_candidates=3, rerank=False)
    prior, tokenizer = tiny_pipeline.prior, tiny_pipeline.image_tokenizer
    sequences = sample(prior, prior.prefix([PROMPT]), [0, 1, 2], tiny_pipeline.sampling)
    codes = unflatten_codes(sequences, tokenizer.code_shape)
    assert torch.equal(codes, generated.codes)
    assert [image.tobytes() for row in codes for image in to_pil(tokenizer.decode(row[None]))] == pixels(generated)


def test_seeds_may_be_named(tiny_pipeline: TextToImagePipeline) -> None:
    named = tiny_pipeline(PROMPT, seeds=[11, 4, 2**53 - 1], rerank=False)
    assert named.seeds == [11, 4, 2**53 - 1]
    assert pixels(named)[1] == pixels(tiny_pipeline(PROMPT, seed=4, num_candidates=1))[0]
    assert tiny_pipeline(PROMPT, seeds=[11, 11], rerank=False).seeds == [11, 11]


def test_settings_left_out_are_the_bundles(tiny_pipeline: TextToImagePipeline) -> None:
    assert tiny_pipeline.sampling.top_k == 20 and tiny_pipeline.sampling.guidance_scale == 2
    usual = tiny_pipeline(PROMPT, rerank=False)
    assert len(usual.images) == 4
    same = tiny_pipeline(PROMPT, rerank=False, temperature=1.0, top_k=20, top_p=1.0, guidance_scale=2.0)
    assert torch.equal(usual.codes, same.codes)
    for change in ({"top_k": 1}, {"temperature": 0.2}, {"top_p": 0.3}, {"guidance_scale": 1.0}):
        assert not torch.equal(usual.codes, tiny_pipeline(PROMPT, rerank=False, **change).codes)
    assert tiny_pipeline.settings(top_k=0).top_k is None


def test_a_reranker_of_ones_own(tiny_pipeline: TextToImagePipeline) -> None:
    class Brightest:
        def score(self, prompt: str, images: Tensor, codes: Tensor) -> Tensor:
            assert prompt == PROMPT and len(images) == len(codes)
            return images.mean((1, 2, 3))

    pipeline = TextToImagePipeline(tiny_pipeline.image_tokenizer, tiny_pipeline.prior, Brightest())
    means = [sum(image.tobytes()) for image in pipeline(PROMPT, num_images_per_prompt=5, num_candidates=5).images]
    assert means == sorted(means, reverse=True)
    with pytest.raises(InputError, match="Brightest cannot be saved"):
        pipeline.save_pretrained("nowhere")


def test_progress_rises_to_the_total(tiny_pipeline: TextToImagePipeline) -> None:
    seen: list[tuple[int, int]] = []
    tiny_pipeline([PROMPT, "a dog"], num_candidates=5, batch_size=2, progress=lambda *report: seen.append(report))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {total for _, total in seen} == {2 * 5 * 16} and seen[-1][0] == 2 * 5 * 16


@given(prompts=st.integers(1, 6), count=st.integers(1, 9), rows=st.integers(1, 30))
def test_batches_cover_every_candidate_once_in_order(prompts: int, count: int, rows: int) -> None:
    made = list(batches(prompts, range(count), rows))
    assert all((last - first) * len(seeds) <= rows for first, last, seeds in made)
    covered = [(prompt, seed) for first, last, seeds in made for prompt in range(first, last) for seed in seeds]
    assert covered == [(prompt, seed) for prompt in range(prompts) for seed in range(count)]


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("", "the prompt is empty; say what the picture should show"),
        (" \t\n", "the prompt is empty"),
        ("a\0b", "looks like binary data, it has the character U+0000; give text"),
        ("a \x1b[31m heart", "U+001B"),
        (b"\xff\xfe heart".decode(errors="surrogateescape"), "looks like binary data"),
        ("🎉🎉", "the prompt '🎉🎉' has no letter or digit; describe the picture in words"),
        ("❤️👍🏽!?", "has no letter or digit"),
        ("...", "has no letter or digit"),
        ("心" * 33_000, "the prompt has 33,000 characters, at most 32,000 are read; shorten it"),
        ([], "there are no prompts; give at least one"),
        (["a dog", ""], "prompt 2 of 2: the prompt is empty"),
        (7, "a prompt must be text, got int"),
        (["a dog", None], "prompt 2 of 2: a prompt must be text, got NoneType"),
    ],
)
def test_bad_prompts(tiny_pipeline: TextToImagePipeline, prompt: Any, sentence: str) -> None:
    assert any(part in refusal(tiny_pipeline, prompt) for part in sentence.split("|"))


@pytest.mark.parametrize("prompt", ["a dog", "狗", "3", "कुत्ता", "a 🎉 party\nwith a\ttab", "ночь", "①"])
def test_good_prompts(prompt: str) -> None:
    check_prompt(prompt)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"num_images_per_prompt": 5, "num_candidates": 4},
            "num_images_per_prompt must be at most num_candidates 4, got 5",
        ),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number of at least 1, got 0"),
        ({"num_images_per_prompt": -1}, "num_images_per_prompt must be a whole number of at least 1, got -1"),
        ({"num_candidates": 0}, "num_candidates must be a whole number of at least 1, got 0"),
        ({"num_candidates": -3}, "num_candidates must be a whole number of at least 1, got -3"),
        ({"num_candidates": 2.5}, "num_candidates must be a whole number of at least 1, got 2.5"),
        ({"num_candidates": True}, "num_candidates must be a whole number"),
        ({"num_candidates": 10**9}, "1,000,000,000 candidates for 1 prompts need about 1,896.0 GB of memory, and"),
        ({"num_candidates": 10**15}, "GB are free; ask for fewer"),
        ({"num_candidates": 10**30}, "go beyond 9,007,199,254,740,991; ask for less"),
        ({"num_candidates": 10**6, "batch_size": 10**6}, "GB are free; ask for fewer"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"seed": 2**53}, "go beyond 9,007,199,254,740,991"),
        ({"seed": "x" * 99}, "seed must be a whole number of at least 0, got 'xxx"),
        ({"seeds": []}, "seeds must be at least one number"),
        ({"seeds": [1, -2]}, "each of seeds must be a whole number of at least 0, got -2"),
        ({"seeds": [1, 2**60]}, "of at most 9,007,199,254,740,991"),
        ({"temperature": 0}, "temperature: Input should be greater than 0, got 0"),
        ({"temperature": -1.0}, "temperature: Input should be greater than 0"),
        ({"temperature": float("nan")}, "temperature must be a finite number, got nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number, got inf"),
        ({"guidance_scale": -1}, "guidance_scale: Input should be greater than or equal to 0"),
        ({"top_k": -1}, "top_k: Input should be greater than or equal to 1"),
        ({"top_p": 0.0}, "top_p: Input should be greater than 0"),
        ({"top_p": 1.5}, "top_p: Input should be less than or equal to 1"),
        ({"min_p": 1.5}, "min_p: Input should be less than or equal to 1"),
        ({"min_p": -0.1}, "min_p: Input should be greater than 0"),
        ({"guidance_schedule": "square"}, "guidance_schedule: Input should be 'constant', 'linear' or 'cosine'"),
        ({"negative_prompt": "a cat", "guidance_scale": 1.0}, "a negative prompt is what guidance steers away from"),
        ({"negative_prompt": "!!"}, "the negative prompt '!!' has no letter or digit"),
        ({"negative_prompt": 7}, "a negative prompt must be text, got int"),
        ({"first_codes": [1, 32]}, "first_codes must be in [0, 32), got 32"),
        ({"first_codes": [-1, 31]}, "first_codes must be in [0, 32), got -1"),
        ({"first_codes": [1] * 16}, "first_codes must leave something to draw of 16 codes, got 16"),
        ({"first_codes": [0.5]}, "first_codes must be (n,) whole numbers"),
        ({"first_codes": [[1, 2]]}, "first_codes must be (n,) whole numbers, got (1, 2)"),
        ({"first_codes": ["x"]}, "first_codes must be whole numbers"),
        ({"candidate_budget": 0}, "candidate_budget must be above 0 and at most 1, got 0"),
        ({"candidate_budget": 1.5}, "candidate_budget must be above 0 and at most 1, got 1.5"),
        ({"candidate_budget": float("nan")}, "candidate_budget must be above 0 and at most 1, got nan"),
        (
            {"candidate_budget": 0.05},
            "a candidate_budget of 0.05 is too little for 16 candidates of 16 codes; raise it",
        ),
        ({"candidate_budget": 0.5, "num_candidates": 1}, "is too little for 1 candidates of 16 codes"),
        (
            {"candidate_budget": 0.5, "num_images_per_prompt": 6},
            "finishes 5 of 16 candidates, but num_images_per_prompt is 6; ask for fewer pictures",
        ),
        ({"candidate_budget": 0.5, "guidance_scale": 1.0}, "which takes guidance; set a guidance_scale other than 1"),
        ({"candidate_budget": 0.5, "prune_by": "luck"}, "prune_by must be 'likelihood' or 'reranker', got 'luck'"),
    ],
)
def test_bad_arguments(tiny_pipeline: TextToImagePipeline, arguments: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(tiny_pipeline, PROMPT, **arguments)


def refusal(pipeline: TextToImagePipeline, prompt: Any, **arguments: Any) -> str:
    """The sentence of the InputError that a call raises before it draws anything."""
    drawn: list[object] = []
    with pytest.raises(InputError) as caught:
        pipeline(prompt, progress=lambda *report: drawn.append(report), **arguments)
    sentence = str(caught.value)
    assert not drawn and "\n" not in sentence and len(sentence) < 300
    return sentence


def test_little_memory_means_small_batches_or_refusal(
    tiny_pipeline: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = tiny_pipeline(PROMPT, num_candidates=9, num_images_per_prompt=9)
    row = tiny_pipeline._row_bytes(tiny_pipeline.sampling)
    monkeypatch.setattr(text_to_image, "free_memory", lambda device: 5 * row)
    steps: list[int] = []
    few = tiny_pipeline(
        PROMPT, num_candidates=9, num_images_per_prompt=9, progress=lambda done, total: steps.append(done)
    )
    assert steps[:2] == [2, 4]  # two rows at once: half of what is free
    assert pixels(few) == pixels(usual)
    monkeypatch.setattr(text_to_image, "free_memory", lambda device: row // 2)
    assert "9 candidates for 1 prompts need about 0.0 GB" in refusal(tiny_pipeline, PROMPT, num_candidates=9)


def test_the_estimate_of_memory_is_of_the_right_size(tiny_pipeline: TextToImagePipeline) -> None:
    """Keys, values and pictures of 64 rows as they are, against what is reckoned for them."""
    prior = tiny_prior(tiny_pipeline.image_tokenizer, tiny_pipeline.prior.text_tokenizer)  # type: ignore[arg-type]
    _, cache = prior.prefill(prior.null_prefix(64), prior.length)
    held = 4 * (cache.keys.numel() + cache.values.numel()) + 4 * 64 * 3 * 16**2
    reckoned = 64 * tiny_pipeline._row_bytes(tiny_pipeline.settings(guidance_scale=1.0))
    assert held <= reckoned <= 3 * held


def test_devices(tiny_bundle: Path) -> None:
    assert find_device("cpu").type == "cpu" and find_device(None).type in ("cpu", "cuda")
    for wrong in ("cuda:99", "toaster"):
        with pytest.raises(InputError, match=f"the device '{wrong}' is not there; use 'cpu' or leave it out"):
            TextToImagePipeline.from_pretrained(tiny_bundle, device=wrong)
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50


def test_other_precisions_draw(tiny_bundle: Path) -> None:
    pipeline = TextToImagePipeline.from_pretrained(tiny_bundle, device="cpu", dtype=torch.bfloat16)
    generated = pipeline(PROMPT, num_candidates=2)
    assert len(generated.images) == 2 and generated.images[0].size == (16, 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu(tiny_bundle: Path) -> None:
    pipeline = TextToImagePipeline.from_pretrained(tiny_bundle, device="cuda")
    generated: Generated = pipeline(PROMPT, num_candidates=5)
    assert len(generated.images) == 4 and generated.codes.device.type == "cpu"


def test_the_package_gives_the_pipeline() -> None:
    import pipelines

    made: Callable[..., object] = pipelines.TextToImagePipeline
    assert made is TextToImagePipeline
