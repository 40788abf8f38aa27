"""Files of `tessera generate`: named, whole, never over somebody else's, and drawn again from what they remember."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pipelines import output as generating
from pipelines.bundle import assemble_bundle, bundle_fingerprint
from pipelines.output import Report, generate, public_name, read_prompts, slug
from pipelines.replay import replay
from pipelines.text_to_image import TextToImagePipeline
from rerank import ClipReranker
from stage2_prior import Sampling, load_prior
from tessera.errors import InputError
from tessera.images import read_origin, save_png, to_tensor
from tests.conftest import tiny_prior

PROMPT = "A red heart, above: a blue circle!"
SLUG = "a-red-heart-above-a-blue-circle"


def draw(output: Path, bundle: Path, prompts: Any = PROMPT, **arguments: Any) -> Report:
    return generate(
        prompts, output, model=bundle, device="cpu", **({"num_candidates": 5, "num_images_per_prompt": 2} | arguments)
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(call: Any, *arguments: Any, **keywords: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments, **keywords)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 600
    return sentence


# Files ----------------------------------------------------------------------------------------------------------------


def test_what_is_written(
    tiny_bundle: Path, tiny_pipeline: TextToImagePipeline, tiny_clip: ClipReranker, tmp_path: Path
) -> None:
    report = draw(tmp_path / "out", tiny_bundle, seed=7, temperature=0.9)
    expected = tiny_pipeline(PROMPT, num_images_per_prompt=5, num_candidates=5, seed=7, temperature=0.9)
    (drawn,) = report.prompts
    assert drawn.prompt == PROMPT and report.candidates == 5
    assert [picture.seed for picture in drawn.images] == expected.seeds[:2]
    assert [picture.score for picture in drawn.images] == pytest.approx(expected.scores[:2], abs=1e-6)  # type: ignore[index]
    assert 0 < report.images_per_second and 5 / report.images_per_second <= report.seconds
    files = [f"{SLUG}-{rank}-seed{seed}.png" for rank, seed in enumerate(expected.seeds[:2], 1)]
    assert [Path(picture.path).name for picture in drawn.images] == files
    assert drawn.sheet is not None and Path(drawn.sheet).name == f"{SLUG}-candidates.png"
    assert names(tmp_path / "out") == sorted([*files, f"{SLUG}-candidates.png"])

    for picture, image in zip(drawn.images, expected.images, strict=False):
        with Image.open(picture.path) as opened:
            assert opened.mode == "RGB" and opened.tobytes() == image.tobytes()
        origin = read_origin(picture.path)
        assert origin["prompt"] == PROMPT and origin["score"] == picture.score
        assert origin["request"]["prompts"] == [{"type": "text", "text": PROMPT}]
        assert origin["request"].get("seed", 0) == picture.seed and origin["request"]["num_candidates"] == 1
        assert origin["request"]["sampling"] == {
            "temperature": 0.9,
            "top_k": 20,
            "top_p": None,
            "min_p": None,
            "guidance_scale": 2.0,
            "guidance_schedule": "constant",
            "plausibility": None,
        }
        assert origin["bundle"] == bundle_fingerprint(tiny_bundle) and origin["version"]
        assert str(tmp_path) not in json.dumps(origin) and origin["model"] == "tiny"
        score = tiny_clip.score(PROMPT, to_tensor(image)[None]).item()
        assert score == pytest.approx(picture.score, abs=1e-2)


def test_the_sheet_shows_all_candidates(tiny_bundle: Path, tiny_pipeline: TextToImagePipeline, tmp_path: Path) -> None:
    report = draw(tmp_path, tiny_bundle)
    expected = tiny_pipeline(PROMPT, num_images_per_prompt=5, num_candidates=5)
    sheet = np.asarray(Image.open(str(report.prompts[0].sheet)))
    for index, image in enumerate(expected.images):
        left = 4 + index * (8 * 16 + 4)
        shown = sheet[4 : 4 + 128, left : left + 128]
        assert np.array_equal(shown[::8, ::8], np.asarray(image))  # each pixel as 8x8
    assert read_origin(str(report.prompts[0].sheet))["seeds"] == expected.seeds
    assert draw(tmp_path / "bare", tiny_bundle, sheet=False).prompts[0].sheet is None
    assert len(names(tmp_path / "bare")) == 2


def test_many_prompts(tiny_bundle: Path, tmp_path: Path) -> None:
    prompts = ["a dog", "红心在蓝色圆圈上方", *(f"cat {number}" for number in range(15))]
    report = draw(tmp_path / "all", tiny_bundle, prompts, sheet=False)
    assert [drawn.prompt for drawn in report.prompts] == prompts and report.candidates == 5 * 17
    assert len(names(tmp_path / "all")) == 2 * 17
    assert "红心在蓝色圆圈上方" in report.prompts[1].images[0].path
    alone = draw(tmp_path / "alone", tiny_bundle, "cat 14")
    assert Path(alone.prompts[0].images[0].path).read_bytes() == Path(report.prompts[16].images[0].path).read_bytes()


def test_the_same_command_twice_gives_the_same_files(tiny_bundle: Path, tmp_path: Path) -> None:
    draw(tmp_path, tiny_bundle)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    draw(tmp_path, tiny_bundle)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_other_pictures_are_not_overwritten(tiny_bundle: Path, tmp_path: Path) -> None:
    first = draw(tmp_path, tiny_bundle, rerank=False)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    second = draw(tmp_path, tiny_bundle, rerank=False, temperature=0.5)
    third = draw(tmp_path, tiny_bundle, "a RED heart above a blue circle", rerank=False)
    assert [Path(picture.path).name for picture in first.prompts[0].images] == [
        f"{SLUG}-{i + 1}-seed{i}.png" for i in (0, 1)
    ]
    assert [Path(picture.path).name for picture in second.prompts[0].images] == [
        f"{SLUG}-{i + 1}-seed{i} (2).png" for i in (0, 1)
    ]
    assert Path(str(third.prompts[0].sheet)).name == f"{SLUG}-candidates (3).png"
    assert {name: (tmp_path / name).read_bytes() for name in before} == before

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / f"{SLUG}-1-seed0.png").write_text("a diary")
    draw(tmp_path / "mine", tiny_bundle, rerank=False)
    assert (tmp_path / "mine" / f"{SLUG}-1-seed0.png").read_text() == "a diary"
    assert f"{SLUG}-1-seed0 (2).png" in names(tmp_path / "mine")


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red heart", "a-red-heart"),
        ("../../etc/passwd", "etc-passwd"),
        ("C:\\con?*<>|\"'", "c-con"),
        ("  .hidden  ", "hidden"),
        ("红心在蓝色圆圈上方", "红心在蓝色圆圈上方"),
        ("a ❤️ and a 🎉", "a-and-a"),
        ("कुत्ता", "कुत्ता"),
        ("cafe\u0301", "caf\u00e9"),
        ("word " * 100, "-".join(["word"] * 24)),
        ("心" * 300, "心" * 40),
        ("🎉", "picture"),
    ],
)
def test_file_names(prompt: str, name: str) -> None:
    assert slug(prompt) == name
    assert len(slug(prompt).encode()) <= 120


def test_what_a_picture_tells_of_its_bundle(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert public_name(tiny_bundle) == "tiny"
    monkeypatch.chdir(tiny_bundle)
    assert public_name(".") == "tiny"
    assert public_name("owner/model") == "owner/model"


# Replay ---------------------------------------------------------------------------------------------------------------


def test_replay_draws_the_picture_again(tiny_bundle: Path, tiny_parts: Path, tmp_path: Path) -> None:
    report = draw(tmp_path / "out", tiny_bundle, seed=40, top_k=0)
    picture = report.prompts[0].images[1]
    replayed = replay(picture.path, tmp_path / "again", model=tiny_bundle, device="cpu")
    assert replayed.identical
    assert Path(replayed.path) == tmp_path / "again" / f"{SLUG}-seed{picture.seed}.png"
    assert read_origin(replayed.path) == read_origin(picture.path)
    assert replay(replayed.path, tmp_path / "again", model=tiny_bundle, device="cpu").path == replayed.path

    # Neither the reranker nor the default settings of the bundle decide what is drawn.
    other = assemble_bundle(
        tmp_path / "other",
        **{part: tiny_parts / part for part in ("image_tokenizer", "text_tokenizer", "prior")},
        sampling=Sampling(temperature=0.1, top_k=1, top_p=0.5),
        likelihood_weight=1.0,
    )
    assert replay(picture.path, tmp_path / "third", model=other, device="cpu").identical


def test_replay_of_everything_at_once(tiny_bundle: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.png"
    Image.effect_noise((30, 40), 90).convert("RGB").save(top)
    report = draw(
        tmp_path / "out",
        tiny_bundle,
        num_candidates=8,
        min_p=0.05,
        guidance_scale=3.0,
        guidance_schedule="linear",
        plausibility=0.2,
        negative_prompt="a dog",
        top_of=top,
        candidate_budget=0.6,
        log_probs=True,
    )
    assert (report.candidates, report.finished) == (8, 3)
    for picture in report.prompts[0].images:
        origin = read_origin(picture.path)
        request = origin["request"]
        assert request["sampling"]["min_p"] == 0.05 and request["sampling"]["guidance_schedule"] == "linear"
        assert request["sampling"]["plausibility"] == 0.2
        assert request["negative_prompt"] == "a dog" and len(request["first_codes"]) == 8
        assert picture.log_prob is not None and picture.drawn_log_prob is not None
        assert origin["log_prob"] == picture.log_prob < 0 and picture.drawn_log_prob < 0
        assert replay(picture.path, tmp_path / "again", model=tiny_bundle, device="cpu").identical
    assert len(read_origin(str(report.prompts[0].sheet))["seeds"]) == 3


def test_a_picture_remembers_the_precision_it_was_drawn_in(tiny_bundle: Path, tmp_path: Path) -> None:
    whole, low = (draw(tmp_path / str(kept), tiny_bundle, precision=kept, log_probs=True) for kept in (None, "int8"))
    assert whole.prompts[0].images[0].log_prob != low.prompts[0].images[0].log_prob
    picture = low.prompts[0].images[0].path
    assert read_origin(picture)["precision"] == "int8"
    assert replay(picture, tmp_path / "again", model=tiny_bundle, device="cpu").identical
    with pytest.raises(InputError, match="must be one of float32, bfloat16, int8"):
        draw(tmp_path, tiny_bundle, precision="int4")


def test_pictures_of_earlier_versions_replay(tiny_bundle: Path, tmp_path: Path) -> None:
    """Origins as they were before min-p, schedules, negative prompts and given codes."""
    picture = draw(tmp_path / "out", tiny_bundle).prompts[0].images[0].path
    origin = read_origin(picture)
    whole = origin["request"]["sampling"]
    origin["sampling"] = {name: whole[name] for name in ("temperature", "top_k", "top_p", "guidance_scale")}
    origin["seed"] = origin["request"].get("seed", 0)
    known = {"prompt", "seed", "sampling", "bundle", "model", "version", "score"}
    with Image.open(picture) as opened:
        save_png(opened.copy(), tmp_path / "old.png", {name: origin[name] for name in known})
    assert replay(tmp_path / "old.png", tmp_path / "again", model=tiny_bundle, device="cpu").identical


def test_replay_says_when_the_pixels_differ(tiny_bundle: Path, tmp_path: Path) -> None:
    picture = Path(draw(tmp_path, tiny_bundle).prompts[0].images[0].path)
    with Image.open(picture) as opened:
        info = PngImagePlugin.PngInfo()
        info.add_itxt("tessera", opened.text["tessera"])  # type: ignore[attr-defined]
        Image.new("RGB", opened.size).save(tmp_path / "painted.png", pnginfo=info)
    assert not replay(tmp_path / "painted.png", tmp_path / "again", model=tiny_bundle, device="cpu").identical


def test_replay_needs_the_bundle(tiny_bundle: Path, tiny_parts: Path, tmp_path: Path) -> None:
    picture = draw(tmp_path / "out", tiny_bundle).prompts[0].images[0].path
    said = refusal(replay, picture, tmp_path / "again")  # it was a folder, which the picture tells only the name of
    assert "there is no bundle 'tiny'" in said and said.endswith("name it with --model")

    prior = load_prior(tiny_parts / "prior", load_prior(tiny_bundle / "prior").text_tokenizer)
    assert prior.text_tokenizer is not None
    autoencoder = TextToImagePipeline.from_pretrained(tiny_bundle, rerank=False, device="cpu").image_tokenizer
    tiny_prior(autoencoder, prior.text_tokenizer, seed=1).save_pretrained(tmp_path / "prior")
    other = assemble_bundle(
        tmp_path / "other",
        image_tokenizer=tiny_parts / "image_tokenizer",
        text_tokenizer=tiny_parts / "text_tokenizer",
        prior=tmp_path / "prior",
    )
    said = refusal(replay, picture, tmp_path / "again", model=other)
    assert f"was drawn with the bundle {bundle_fingerprint(tiny_bundle)}" in said
    assert f"{other} is {bundle_fingerprint(other)}" in said
    assert not (tmp_path / "again").exists()


def test_replay_of_other_files(tiny_bundle: Path, tmp_path: Path) -> None:
    sheet = draw(tmp_path / "out", tiny_bundle).prompts[0].sheet
    assert "is a contact sheet; replay one of the images instead" in refusal(replay, sheet, tmp_path / "again")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    assert "does not carry its origin" in refusal(replay, tmp_path / "photo.png", tmp_path / "again")
    (tmp_path / "text.png").write_text("no picture")
    assert "is not a readable picture" in refusal(replay, tmp_path / "text.png", tmp_path / "again")
    assert "none.png does not exist" in refusal(replay, tmp_path / "none.png", tmp_path / "again")
    for content in ("{}", "[]", "not json", '{"prompt": "x", "seed": "many"}', '{"seed": 1}'):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("tessera", content)
        Image.new("RGB", (8, 8)).save(tmp_path / "forged.png", pnginfo=info)
        assert str(tmp_path / "forged.png") in refusal(replay, tmp_path / "forged.png", tmp_path / "again")
    assert not (tmp_path / "again").exists()


# Prompts from a file --------------------------------------------------------------------------------------------------


def test_prompts_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a dog", "split": "seen"}\n\n"红心"\r\n{"prompt": ""}\n"a\u2028heart\x85"', encoding="utf-8-sig"
    )
    assert read_prompts(path) == ["a dog", "红心", "", "a\u2028heart\x85"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "has no prompts; give a JSONL file"),
        (b"\n \n", "has no prompts"),
        (b'"a dog"\na cat\n', ", line 2 is not valid JSON (Expecting value); each line must look like"),
        (b'{"text": "a dog"}', ", line 1 has no prompt; each line must look like"),
        (b'{"prompt": 3}', ", line 1 has no prompt"),
        (b"[1]", ", line 1 has no prompt"),
        (b"\xff\xfe\x00", "line 1: not UTF-16 text"),
        (b"\xff", "line 1: not UTF-8 text"),
        (b'{"prompt": "a \\ud83d heart"}', "line 1: half a character (U+D83D)"),
    ],
)
def test_broken_prompt_files(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(content)
    said = refusal(read_prompts, tmp_path / "prompts.jsonl")
    assert sentence in said and str(tmp_path / "prompts.jsonl") in said


def test_no_prompt_file(tmp_path: Path) -> None:
    assert "No such file" in refusal(read_prompts, tmp_path / "none.jsonl")
    assert f"cannot read {tmp_path}: Is a directory" in refusal(read_prompts, tmp_path)


# Bad input leaves nothing behind --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prompts": ""}, "the prompt is empty"),
        ({"prompts": "🎉"}, "no letter or digit"),
        ({"prompts": "a\0"}, "binary"),
        ({"prompts": "heart " * 6000}, "shorten it"),
        ({"prompts": ["a dog", "heart " * 6000]}, "prompt 2 of 2"),
        ({"top_of": "none.png"}, "none.png does not exist"),
        ({"candidate_budget": 0.01}, "too little"),
        ({"num_images_per_prompt": 6}, "num_images_per_prompt must be at most num_candidates 5, got 6"),
        ({"num_candidates": -1}, "num_candidates must be"),
        ({"num_candidates": 10**10}, "GB of memory"),
        ({"seed": -1}, "seed must be"),
        ({"temperature": 0}, "temperature"),
        ({"bundle": Path("no/such")}, "neither an existing folder nor|is not a folder here"),
    ],
)
def test_bad_input_leaves_no_folder(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], sentence: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refusal(draw, tmp_path / "deep" / "out", **({"bundle": tiny_bundle} | arguments))
    assert any(part in said for part in sentence.split("|"))
    assert names(tmp_path) == []


def test_an_output_folder_that_cannot_be_written(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextToImagePipeline, "__call__", lambda *_, **__: pytest.fail("drew something"))
    (tmp_path / "file").write_text("mine")
    for wrong in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "made" / ("x" * 300)):
        said = refusal(draw, wrong, tiny_bundle)
        assert f"cannot write the output folder {wrong}:" in said and said.endswith("choose another one")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_output_folder(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    for wrong in (tmp_path / "locked", tmp_path / "locked" / "below"):
        assert "cannot write the output folder" in refusal(draw, wrong, tiny_bundle)


def test_what_was_finished_before_an_error_is_whole(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Path] = []
    save = generating.save_png

    def full_disk(image: Image.Image, path: Path, origin: Any) -> None:
        if len(saved) == 1:
            raise InputError(f"cannot write {path}: No space left on device; choose another folder")
        save(image, path, origin)
        saved.append(path)

    monkeypatch.setattr(generating, "save_png", full_disk)
    assert "No space left" in refusal(draw, tmp_path / "out", tiny_bundle)
    assert [tmp_path / "out" / name for name in names(tmp_path / "out")] == saved
    Image.open(saved[0]).load()
    shutil.rmtree(tmp_path / "out")
    refusal(draw, tmp_path / "out", tiny_bundle)  # now the very first picture cannot be written
    assert names(tmp_path) == []
