"""The pipeline: a picture depends on prompt, seed and sampling alone, the best come first, bad input is a sentence."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipelines import beside, memory
from pipelines.bundle import Bundle
from pipelines.conditions import ClassLabel, NoPrompt
from pipelines.generate import Generated
from pipelines.memory import batches, row_bytes
from pipelines.pruning import fill
from pipelines.request import check_text as check_prompt
from pipelines.text_to_image import TextToImagePipeline
from rerank import ClipReranker
from stage2_prior import GPTConfig, GPTPrior, flatten_codes, sample, unflatten_codes
from tessera.errors import InputError, InputWarning
from tessera.hardware import find_device, free_memory
from tessera.images import to_pil
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


@pytest.mark.parametrize("threaded", [True, False])
def test_pictures_are_the_same_decoded_beside_drawing_and_in_turn(
    tiny_pipeline: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch, threaded: bool
) -> None:
    """As on a GPU and as on a CPU, beside one prompt and one candidate at a time."""
    monkeypatch.setattr(beside, "runs_beside", lambda device: threaded)
    prompts = [PROMPT, "a dog"]
    together = tiny_pipeline(prompts, num_images_per_prompt=3, num_candidates=3, batch_size=1)
    for i, prompt in enumerate(prompts):
        alone = tiny_pipeline(prompt, num_images_per_prompt=3, num_candidates=3, batch_size=3)
        assert pixels(alone) == pixels(together)[3 * i : 3 * i + 3] and alone.seeds == together.seeds[3 * i : 3 * i + 3]


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


@pytest.mark.parametrize("budget", [None, 0.5])
def test_the_likelihood_of_the_codes_counts_in_the_order(
    tiny_pipeline: TextToImagePipeline, tiny_clip: ClipReranker, budget: float | None
) -> None:
    count: dict[str, Any] = {"num_images_per_prompt": 4, "num_candidates": 12, "candidate_budget": budget}
    ranked = tiny_pipeline(PROMPT, likelihood_weight=0.5, log_probs=True, **count)
    prior, images = tiny_pipeline.prior, tiny_pipeline.image_tokenizer.decode(ranked.codes)
    logits = prior(prior.prefix([PROMPT]).expand(4, -1), flatten_codes(ranked.codes)).log_softmax(-1)
    likelihood = logits.gather(-1, flatten_codes(ranked.codes)[..., None]).sum((1, 2))
    torch.testing.assert_close(
        torch.tensor(ranked.scores), tiny_clip.score(PROMPT, images) + 0.5 * likelihood, rtol=1e-4, atol=1e-3
    )
    assert ranked.scores == sorted(ranked.scores or [], reverse=True)
    plain = tiny_pipeline(PROMPT, **count)
    assert ranked.seeds != plain.seeds and ranked.log_probs is not None and plain.log_probs is None

    own = TextToImagePipeline(replace(tiny_pipeline.bundle, likelihood_weight=0.5))
    assert own(PROMPT, **count).seeds == ranked.seeds and own(PROMPT, **count).log_probs is None
    assert own(PROMPT, likelihood_weight=0, **count).seeds == plain.seeds
    assert own(PROMPT, num_candidates=2, rerank=False).scores is None


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

    pipeline = TextToImagePipeline(replace(tiny_pipeline.bundle, reranker=Brightest()))
    means = [sum(image.tobytes()) for image in pipeline(PROMPT, num_images_per_prompt=5, num_candidates=5).images]
    assert means == sorted(means, reverse=True)
    with pytest.raises(InputError, match="Brightest cannot be saved"):
        pipeline.save_pretrained("nowhere")


def test_progress_rises_to_the_total(tiny_pipeline: TextToImagePipeline) -> None:
    seen: list[tuple[int, int]] = []
    tiny_pipeline([PROMPT, "a dog"], num_candidates=5, batch_size=2, progress=lambda *report: seen.append(report))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {total for _, total in seen} == {2 * 5 * 16} and seen[-1][0] == 2 * 5 * 16


# Sampling -------------------------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 16,
    "top_p": 0.97,
    "min_p": 0.01,
    "guidance_scale": 3.0,
    "guidance_schedule": "cosine",
    "plausibility": 0.01,
    "negative_prompt": "a dog",
    "first_codes": [3, 1, 4, 1, 5],
}


def test_everything_at_once_depends_on_the_seed_alone(tiny_pipeline: TextToImagePipeline) -> None:
    together = tiny_pipeline(PROMPT, num_images_per_prompt=6, num_candidates=6, batch_size=4, **EVERYTHING)
    for image, seed, codes in zip(together.images, together.seeds, together.codes, strict=True):
        alone = tiny_pipeline([PROMPT], num_candidates=1, seed=seed, rerank=False, **EVERYTHING)
        assert torch.equal(alone.codes[0], codes) and alone.images[0].tobytes() == image.tobytes()
        assert codes.flatten()[:5].tolist() == [3, 1, 4, 1, 5]
    for change in EVERYTHING:
        without = {name: value for name, value in EVERYTHING.items() if name != change}
        if change in ("top_k", "top_p", "min_p", "plausibility"):  # which may leave alone what is drawn by chance
            assert tiny_pipeline(PROMPT, num_candidates=1, **without).codes.shape == (1, 1, 4, 4)
        else:
            other = tiny_pipeline(PROMPT, num_images_per_prompt=6, num_candidates=6, rerank=False, **without)
            assert not torch.equal(other.codes, together.codes[torch.tensor(together.seeds).argsort()])


def test_settings_may_come_as_a_whole(tiny_pipeline: TextToImagePipeline) -> None:
    sampling = tiny_pipeline.settings(min_p=0.1, top_k=0, guidance_schedule="linear")
    assert (sampling.min_p, sampling.top_k, sampling.guidance_scale) == (0.1, None, 2.0)
    assert tiny_pipeline.settings(sampling, min_p=0).min_p is None
    assert tiny_pipeline.settings(tiny_pipeline.settings(plausibility=0.1), plausibility=0).plausibility is None
    whole = tiny_pipeline(PROMPT, num_candidates=3, sampling=sampling)
    parts = tiny_pipeline(PROMPT, num_candidates=3, min_p=0.1, top_k=0, guidance_schedule="linear")
    assert torch.equal(whole.codes, parts.codes)


def test_log_probabilities_are_those_of_the_codes(tiny_pipeline: TextToImagePipeline) -> None:
    prompts = [PROMPT, "a dog"]
    generated = tiny_pipeline(prompts, num_images_per_prompt=3, num_candidates=4, log_probs=True)
    assert generated.log_probs is not None and generated.drawn_log_probs is not None
    prior, codes = tiny_pipeline.prior, flatten_codes(generated.codes)
    with torch.no_grad():
        logits = prior(prior.prefix(prompts).repeat_interleave(3, 0), codes)
    forced = logits.log_softmax(-1).gather(-1, codes.unsqueeze(-1))[..., 0]
    torch.testing.assert_close(generated.log_probs.sum(-1), forced.sum(-1), rtol=0, atol=1e-4)
    assert (generated.drawn_log_probs <= 0).all()
    assert not torch.allclose(generated.drawn_log_probs, generated.log_probs, atol=1e-2)  # guidance and top-k
    plain = tiny_pipeline(prompts, num_images_per_prompt=3, num_candidates=4)
    assert plain.log_probs is None and torch.equal(plain.codes, generated.codes)


def test_the_top_of_a_picture_stays(tiny_pipeline: TextToImagePipeline) -> None:
    picture = tiny_pipeline("a dog", num_candidates=1).images[0].resize((40, 30))
    first = tiny_pipeline.codes_of_top(picture)
    assert len(first) == 8 and len(tiny_pipeline.codes_of_top(picture, 1)) == 4
    generated = tiny_pipeline(PROMPT, num_candidates=3, first_codes=first)
    assert all(torch.equal(codes.flatten()[:8], first) for codes in generated.codes)
    assert len({tuple(codes.flatten().tolist()) for codes in generated.codes}) == 3
    for rows in (4, 0, True):
        with pytest.raises(InputError, match="top_rows must be"):
            tiny_pipeline.codes_of_top(picture, rows)


@pytest.mark.parametrize(
    ("prompt", "kept"),
    [
        ("heart " * 100, "heart "),
        ("x" * 10_000, "x"),
        ("红心在蓝色圆圈上方" * 40, "红心在蓝色圆圈上方"),
    ],
)
def test_a_long_prompt_is_cut_and_the_warning_shows_what_was_left_out(
    tiny_pipeline: TextToImagePipeline, prompt: str, kept: str
) -> None:
    with pytest.warns(InputWarning, match="prompt 2 is longer than the prior reads; left out is '") as caught:
        prefixes = tiny_pipeline.prefixes(["a dog", prompt])
    (warning,) = caught
    shown = str(warning.message).split("left out is '")[1].removesuffix("'")
    assert "\n" not in shown and len(shown) < 200
    if "..." in shown:
        shown, count = shown.split("... (")
        left = int(count.split()[0].replace(",", ""))
    else:
        left = len(shown)
    tokenizer = tiny_pipeline.prior.text_tokenizer
    assert tokenizer is not None
    start = tokenizer.decode(prefixes[1].tolist())
    assert prompt.startswith(start.strip()) and kept[:1] in start
    assert abs(len(prompt) - len(start) - left) <= 3 and shown[:100].strip() in " ".join(prompt.split())
    assert int((prefixes[1] == 0).sum()) <= 2  # nearly all of the room is used
    with pytest.warns(InputWarning, match="the prompt is longer"):
        assert len(tiny_pipeline(prompt, num_candidates=1).images) == 1
    with pytest.warns(InputWarning, match="the negative prompt is longer"):
        assert len(tiny_pipeline("a dog", num_candidates=1, negative_prompt=prompt).images) == 1


@pytest.mark.parametrize("prompt", [NoPrompt(), ClassLabel(3)])
def test_what_the_prior_does_not_draw_from_is_refused_and_not_cut(
    tiny_pipeline: TextToImagePipeline, prompt: str
) -> None:
    with pytest.raises(InputError, match="this prior draws from text and was given"):
        tiny_pipeline(prompt, num_candidates=1)


def test_only_its_length_is_a_reason_to_cut_a_prompt(
    tiny_pipeline: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(text: Sequence[str]) -> Tensor:
        raise InputError("no letter of it is known")

    monkeypatch.setattr(tiny_pipeline.prior, "text_prefix", refuse)
    with pytest.raises(InputError, match="no letter of it is known"):
        tiny_pipeline("a dog", num_candidates=1)


def test_guidance_on_a_prior_trained_without_dropout_is_warned_of(tiny_pipeline: TextToImagePipeline) -> None:
    config = tiny_pipeline.prior.config
    assert isinstance(config, GPTConfig)
    never = GPTPrior(config.model_copy(update={"condition_dropout": 0.0}))
    never.text_tokenizer = tiny_pipeline.prior.text_tokenizer
    pipeline = TextToImagePipeline(replace(tiny_pipeline.bundle, prior=never.eval(), reranker=None))
    with pytest.warns(InputWarning, match="trained without condition_dropout"):
        assert len(pipeline(PROMPT, num_candidates=1).images) == 1
    pipeline(PROMPT, num_candidates=1, guidance_scale=1.0)  # ours would be an error
    pipeline(PROMPT, num_candidates=1, negative_prompt="a dog")


# Early pruning and streams --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prune_by", ["likelihood", "reranker"])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_pruned_pictures_are_those_of_the_full_run(
    tiny_pipeline: TextToImagePipeline, prune_by: Any, batch_size: int | None
) -> None:
    prompts, seen = [PROMPT, "a dog"], []
    full = tiny_pipeline(prompts, num_images_per_prompt=12, num_candidates=12)
    pruned = tiny_pipeline(
        prompts,
        num_candidates=12,
        candidate_budget=0.5,
        prune_by=prune_by,
        batch_size=batch_size,
        progress=lambda *report: seen.append(report),
    )
    assert len(pruned.images) == 2 * 4 and pruned.scores is not None and full.scores is not None
    for i, image in enumerate(pixels(pruned)):
        own = i // 4 * 12 + full.seeds[i // 4 * 12 :][:12].index(pruned.seeds[i])
        assert pixels(full)[own] == image and torch.equal(full.codes[own], pruned.codes[i])
        assert pruned.scores[i] == pytest.approx(full.scores[own], abs=1e-6)
    assert seen[-1][0] == seen[-1][1] and (batch_size or seen[-1][1] <= 0.5 * 2 * 12 * 16)
    assert pruned.scores[:4] == sorted(pruned.scores[:4], reverse=True)


def test_the_whole_budget_prunes_nothing(tiny_pipeline: TextToImagePipeline) -> None:
    whole = tiny_pipeline(PROMPT, num_candidates=3, candidate_budget=1.0)
    assert whole.seeds == tiny_pipeline(PROMPT, num_candidates=3).seeds
    assert len(tiny_pipeline(PROMPT, num_candidates=6, candidate_budget=0.5).images) == 2  # all that are finished


def test_pruning_by_a_reranker_needs_one(tiny_pipeline: TextToImagePipeline) -> None:
    bare = TextToImagePipeline(Bundle(tiny_pipeline.image_tokenizer, tiny_pipeline.prior))
    assert "there is no reranker to prune by" in refusal(bare, PROMPT, candidate_budget=0.5, prune_by="reranker")


def test_missing_codes_repeat_the_row_above() -> None:
    row = torch.tensor([[1, 2, 3, 4, 5, 6]])
    assert fill(row, (1, 4, 3)).tolist() == [[1, 2, 3, 4, 5, 6, 4, 5, 6, 4, 5, 6]]
    assert fill(row[:, :5], (1, 4, 3)).tolist() == [[1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 3]]
    assert fill(row[:, :2], (1, 2, 3)).tolist() == [[1, 2, 2, 1, 2, 2]]
    assert fill(row[:, :3], (2, 2, 2)).tolist() == [[1, 2, 3, 2, 1, 2, 3, 2]]
    assert fill(row[:, :1], (2, 1, 2)).tolist() == [[1, 1, 1, 1]]


def test_a_stream_gives_every_prompt_what_a_call_gives(tiny_pipeline: TextToImagePipeline) -> None:
    prompts = [PROMPT, "a dog", "红心"]
    call = tiny_pipeline(prompts, num_images_per_prompt=5, num_candidates=5)
    streamed = list(tiny_pipeline.stream(prompts, num_candidates=5, batch_size=3))
    assert [seed for one in streamed for seed in one.seeds] == call.seeds
    assert [image for one in streamed for image in pixels(one)] == pixels(call)
    with pytest.raises(InputError, match="temperature"):  # before anything is asked of the stream
        tiny_pipeline.stream(prompts, temperature=-1.0)


def test_a_prompt_is_decoded_while_the_next_is_drawn(
    tiny_pipeline: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first picture waits until the second prompt is being drawn, which it would for ever if they took turns."""
    monkeypatch.setattr(beside, "runs_beside", lambda device: True)
    drawing_next, decode = threading.Event(), tiny_pipeline.image_tokenizer.decode

    def wait(codes: Tensor) -> Tensor:
        assert drawing_next.wait(60), "the next prompt was not drawn meanwhile"
        return decode(codes)

    def progress(done: int, total: int) -> None:
        if done > total // 2:
            drawing_next.set()

    monkeypatch.setattr(tiny_pipeline.image_tokenizer, "decode", wait)
    assert len(tiny_pipeline([PROMPT, "a dog"], num_candidates=1, batch_size=1, progress=progress).images) == 2


def test_what_fails_in_the_second_thread_is_raised(tiny_pipeline: TextToImagePipeline) -> None:
    class Broken:
        def score(self, prompt: str, images: Tensor, codes: Tensor) -> Tensor:
            raise RuntimeError("no score today")

    pipeline = TextToImagePipeline(replace(tiny_pipeline.bundle, reranker=Broken()))
    with pytest.raises(RuntimeError, match="no score today"):
        pipeline([PROMPT, "a dog"], num_candidates=2, batch_size=2)


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
        ("", "the prompt is empty; say what the image should show"),
        (" \t\n", "the prompt is empty"),
        ("a\0b", "looks like binary data, it has the character U+0000; give text"),
        ("a \x1b[31m heart", "U+001B"),
        (b"\xff\xfe heart".decode(errors="surrogateescape"), "looks like binary data"),
        ("🎉🎉", "the prompt '🎉🎉' has no letter or digit; describe the image in words"),
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
        ({"plausibility": 1.5}, "plausibility: Input should be less than or equal to 1"),
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
        ({"likelihood_weight": -1}, "likelihood_weight must be a finite number from 0 on, got -1"),
        ({"likelihood_weight": float("inf")}, "likelihood_weight must be a finite number from 0 on, got inf"),
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
            "finishes 5 of 16 candidates, but num_images_per_prompt is 6; ask for fewer images",
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
    row = row_bytes(tiny_pipeline.bundle, tiny_pipeline.sampling)
    monkeypatch.setattr(memory, "free_memory", lambda device: 5 * row)
    steps: list[int] = []
    few = tiny_pipeline(
        PROMPT, num_candidates=9, num_images_per_prompt=9, progress=lambda done, total: steps.append(done)
    )
    assert steps[:2] == [2, 4]  # two rows at once: half of what is free
    assert pixels(few) == pixels(usual)
    monkeypatch.setattr(memory, "free_memory", lambda device: row // 2)
    assert "9 candidates for 1 prompts need about 0.0 GB" in refusal(tiny_pipeline, PROMPT, num_candidates=9)


def test_the_estimate_of_memory_is_of_the_right_size(tiny_pipeline: TextToImagePipeline) -> None:
    """Keys, values and pictures of 64 rows as they are, against what is reckoned for them."""
    prior = tiny_prior(tiny_pipeline.image_tokenizer, tiny_pipeline.prior.text_tokenizer)  # type: ignore[arg-type]
    _, cache = prior.prefill(prior.null_prefix(64), prior.length)
    held = 4 * (cache.keys.numel() + cache.values.numel()) + 4 * 64 * 3 * 16**2
    reckoned = 64 * row_bytes(tiny_pipeline.bundle, tiny_pipeline.settings(guidance_scale=1.0))
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
