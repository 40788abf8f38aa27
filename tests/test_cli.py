"""The command line: exit codes, one sentence for everything that is wrong, results apart from logs, quick help."""

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from pipelines import cli
from tessera.errors import InputError
from tessera.images import read_origin

ROOT = Path(__file__).resolve().parent.parent
Refused = Callable[..., str]
Ran = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Runs a command that must be refused: exit code 2, nothing on stdout, one sentence on stderr, which is returned.

    Nothing may be left behind in `tmp_path`.
    """

    def run(*arguments: object) -> str:
        capsys.readouterr()
        before = files(tmp_path)
        code = cli.main([str(argument) for argument in arguments])
        out, error = capsys.readouterr()
        assert (code, out) == (2, ""), error
        (line,) = error.splitlines()
        assert line.startswith("tessera: error: ")
        assert files(tmp_path) == before
        return line.removeprefix("tessera: error: ")

    return run


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size for path in folder.rglob("*")}


@pytest.fixture
def ran(capsys: pytest.CaptureFixture[str]) -> Ran:
    """Runs a command that must succeed and returns its standard output."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        out, error = capsys.readouterr()
        assert code == 0, error
        return out

    return run


def picture(path: Path, colour: str = "red", size: int = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)
    return path


# The program ----------------------------------------------------------------------------------------------------------


def test_help_answers_at_once_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pipelines.cli import main; assert main(['--help']) == 0; "
        "heavy = {'torch', 'numpy', 'PIL', 'open_clip', 'transformers', 'accelerate', 'pydantic', 'yaml'}; "
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, f"tessera --help imports {done.stderr}"
    assert "generate" in done.stdout and "train" in done.stdout
    # Seconds of one core, which a busy machine does not change; measured 0.07 to 0.1.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1


def test_no_command_shows_the_help(ran: Ran) -> None:
    assert ran() == ran("--help")


def test_every_command_explains_itself(ran: Ran) -> None:
    commands = ["generate", "rerank", "train", "encode", "bundle", "info"]
    for command in [
        *([name] for name in commands),
        ["evaluate", "tokenizer"],
        ["evaluate", "pipeline"],
        ["data", "check"],
    ]:
        assert "--help" in ran(*command, "--help")


def test_a_process_ends_with_the_exit_code() -> None:
    command = [sys.executable, "-m", "tessera", "info", "no/such/folder"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tessera: error: 'no/such/folder' is neither")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["drew"], "No such command 'drew'"),
        (["evaluate"], "Missing command; see 'tessera evaluate --help'"),
        (["train"], "Missing argument"),
        (["train", "priors", "x.yaml"], "'priors' is not one of 'tokenizer', 'prior', 'reranker', 'text-tokenizer'"),
        (["info", "--colour", "x"], "No such option"),
        (["generate", "x", "-n", "many"], "'-n'.*integer"),
    ],
)
def test_wrong_usage_is_one_sentence(refused: Refused, arguments: list[str], sentence: str) -> None:
    assert re.search(sentence, refused(*arguments))


def test_other_failures_are_one_line_that_says_how_to_see_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def break_down(*_: object) -> None:
        raise RuntimeError("the roof\nis leaking")

    monkeypatch.setattr("tessera.data.check.check", break_down)
    assert cli.main(["data", "check", str(tmp_path)]) == 1
    line = "tessera: failed: RuntimeError: the roof is leaking (TESSERA_DEBUG=1 shows the traceback)\n"
    assert capsys.readouterr() == ("", line)

    monkeypatch.setenv("TESSERA_DEBUG", "1")
    assert cli.main(["data", "check", str(tmp_path)]) == 1
    assert "in break_down" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (KeyboardInterrupt(), 130, ""),
        (InputError("so\n  not"), 2, "tessera: error: so not\n"),
        (
            ModuleNotFoundError("no", name="tensorboard"),
            1,
            "tessera: failed: this needs the package tensorboard; pip install 'tessera[track]'\n",
        ),
    ],
)
def test_what_a_command_raises_decides_the_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int,
    line: str,
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr("pipelines.info.describe", fail)
    assert cli.main(["info", "."]) == code
    assert capsys.readouterr() == ("", line)


# tessera data check ---------------------------------------------------------------------------------------------------


def test_a_data_folder_is_counted(ran: Ran, tmp_path: Path) -> None:
    for name, colour in {"a": "red", "b": "blue", "c": "red"}.items():
        picture(tmp_path / f"{name}.png", colour)
        (tmp_path / f"{name}.txt").write_text(f"a {colour} square\n红色\n", "utf-8")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    report = json.loads(ran("data", "check", tmp_path, "--json"))
    assert (report["pictures"], report["broken"], report["duplicates"]) == (3, 1, 1)
    assert (report["with_captions"], report["captions"], report["different_captions"]) == (3, 6, 3)
    assert "broken.png is not a readable picture" in report["broken_files"][0]
    assert "c.png equals" in report["duplicate_files"][0]
    table = ran("data", "check", tmp_path)
    assert "pictures" in table and "broken.png" in table


def test_a_data_folder_without_use_is_refused(refused: Refused, ran: Ran, tmp_path: Path) -> None:
    assert "is not a folder" in refused("data", "check", tmp_path / "nowhere")
    assert "has no pictures" in refused("data", "check", tmp_path)
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    assert "none of its 1 pictures can be read" in refused("data", "check", tmp_path, "--images-only")
    picture(tmp_path / "a.png")
    assert "has pictures but no captions" in refused("data", "check", tmp_path)
    assert "captions" in ran("data", "check", tmp_path, "--images-only")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"file_name": "a.png", "text": "a"}\n{"file_name": ', "line 2 is not valid JSON"),
        (b'{"text": "a"}', "'file_name' is missing"),
        (b'{"file_name": "../../a.png", "text": "a"}', "leads out of the folder"),
        (b'{"file_name": "a.png", "text": 7}', "'text' must be a caption or a list of captions"),
        (b'{"file_name": "a.png", "text": "a", "weight": -1}', "'weight' must be a number above 0, got -1"),
        (b'{"file_name": "gone.png", "text": "a"}', "gone.png does not exist"),
        (b'{"file_name": "a.png", "text": "\xff\xfe"}', "UTF-8"),
        (b"", "has no pictures"),
    ],
)
def test_broken_metadata_is_one_sentence(refused: Refused, tmp_path: Path, content: bytes, sentence: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_bytes(content)
    assert sentence in refused("data", "check", tmp_path)


def test_an_unknown_split_suggests_the_nearest(refused: Refused, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a", "split": "train"}', "utf-8")
    assert "has no split 'trian', did you mean 'train'?" in refused("data", "check", tmp_path, "--split", "trian")


# tessera generate and rerank ------------------------------------------------------------------------------------------

SMALL = ["--candidates", "2", "-n", "1"]


@pytest.fixture
def draw(tiny_bundle: Path, tmp_path: Path) -> list[object]:
    return ["generate", "--model", tiny_bundle, "--out", tmp_path / "out", "--device", "cpu"]


def test_pictures_are_drawn_listed_and_drawn_again(ran: Ran, draw: list[object], tmp_path: Path) -> None:
    report = json.loads(ran(*draw, "a red heart", "红心", "-n", "2", "--candidates", "3", "--seed", "5", "--json"))
    assert [one["prompt"] for one in report["prompts"]] == ["a red heart", "红心"]
    assert report["candidates"] == 6 and report["images_per_second"] > 0
    for one in report["prompts"]:
        scores = [picture["score"] for picture in one["images"]]
        assert len(scores) == 2 and scores == sorted(scores, reverse=True)
        assert {picture["seed"] for picture in one["images"]} <= {5, 6, 7}
        assert Path(one["sheet"]).is_file()

    first = report["prompts"][0]["images"][0]["path"]
    replayed = json.loads(ran("generate", "--replay", first, "-o", tmp_path / "again", "--model", draw[2], "--json"))
    assert replayed["identical"] and Path(replayed["path"]).read_bytes()

    table = ran(*draw, "a dog", *SMALL, "--no-rerank")
    assert "a dog" in table and str(tmp_path / "out" / "a-dog-1-seed0.png") in table and "all candidates" in table


def test_results_are_on_stdout_and_the_rate_on_stderr(draw: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*map(str, draw), "a dog", *SMALL]) == 0
    out, error = capsys.readouterr()
    assert re.search(r"[0-9.]+ images per second", error) and "images per second" not in out
    assert ".png" in out and ".png" not in error


@pytest.mark.filterwarnings("default::tessera.errors.InputWarning")
def test_a_long_prompt_is_drawn_with_one_line_about_what_was_cut(
    draw: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*map(str, draw), "heart " * 50, *SMALL]) == 0
    out, error = capsys.readouterr()
    warnings = [line for line in error.splitlines() if line.startswith("tessera: warning: ")]
    assert len(warnings) == 1 and "left out is 't heart heart" in warnings[0] and ".png" in out


def test_sampling_options_reach_the_pictures(ran: Ran, draw: list[object], tmp_path: Path) -> None:
    options = ["--min-p", "0.1", "--guidance-schedule", "linear", "--negative-prompt", "a dog", "--log-probs"]
    options += ["--top-of", str(picture(tmp_path / "red.png")), "--top-rows", "1", "--prune-by", "reranker"]
    report = json.loads(ran(*draw, "a heart", "-n", "1", "--candidate-budget", "0.5", *options, "--json"))
    assert (report["candidates"], report["finished"]) == (16, 5)
    (drawn,) = report["prompts"][0]["images"]
    origin = read_origin(drawn["path"])
    request = origin["request"]
    assert (request["sampling"]["min_p"], request["sampling"]["guidance_schedule"]) == (0.1, "linear")
    assert request["negative_prompt"] == "a dog" and len(request["first_codes"]) == 4
    assert drawn["log_prob"] == origin["log_prob"] < 0
    replayed = ran("generate", "--replay", drawn["path"], "-o", tmp_path / "again", "--model", draw[2], "--json")
    assert json.loads(replayed)["identical"]


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("", "the prompt is empty"),
        (" \n\t", "the prompt is empty"),
        ("a heart " * 5_000, "characters, at most"),
        ("🐶🐱", "has no letter or digit"),
        ("\udcff\udcfe\udc00", "looks like binary data"),
        ("a\x00b", "looks like binary data"),
    ],
)
def test_a_prompt_that_says_nothing_is_refused(
    refused: Refused, draw: list[object], prompt: str, sentence: str
) -> None:
    assert sentence in refused(*draw, prompt)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["-n", "5", "--candidates", "4"], "must be at most"),
        (["-n", "0"], "at least 1"),
        (["-n", "-1"], "at least 1"),
        (["--candidates", "0"], "at least 1"),
        (["--candidates", "-16"], "at least 1"),
        (["--candidates", "100000000000"], "GB of memory"),
        (["-n", "99999999999", "--candidates", "99999999999"], "GB of memory"),
        (["--candidates", "9" * 30], "beyond|whole number|integer"),
        (["--seed", "-1"], "seed must be"),
        (["--seed", "9" * 30], "beyond"),
        (["--temperature", "0"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--top-k", "-3"], "top_k"),
        (["--top-p", "1.5"], "top_p"),
        (["--guidance-scale", "inf"], "guidance_scale"),
        (["--guidance-schedule", "square"], "'square' is not one of 'constant', 'linear', 'cosine'"),
        (["--min-p", "2"], "min_p"),
        (["--candidate-budget", "0"], "candidate_budget must be above 0"),
        (
            ["--negative-prompt", "a cat", "--guidance-scale", "1"],
            "a negative prompt is what guidance steers away from",
        ),
        (["--top-of", "gone.png"], "gone.png does not exist"),
        (["--device", "toaster"], "the device 'toaster' is not there"),
    ],
)
def test_counts_and_settings_out_of_range_are_refused(
    refused: Refused, draw: list[object], options: list[str], sentence: str
) -> None:
    assert re.search(sentence, refused(*draw, "a dog", *options))


def test_an_unknown_bundle_is_refused(refused: Refused, tmp_path: Path) -> None:
    draw = ["generate", "a dog", "-o", tmp_path / "out", "--model"]
    assert "there is no bundle 'emojo'" in refused(*draw, "emojo")
    assert "is not a bundle" in refused(*draw, tmp_path)


@pytest.mark.parametrize(
    "name", ["image_tokenizer/model.safetensors", "prior/config.json", "text_tokenizer/tokenizer.json"]
)
@pytest.mark.parametrize("harm", ["missing", "truncated", "swapped"])
def test_a_damaged_bundle_is_refused(refused: Refused, tiny_bundle: Path, tmp_path: Path, name: str, harm: str) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    content = (bundle / name).read_bytes()
    match harm:
        case "missing":
            (bundle / name).unlink()
        case "truncated":
            (bundle / name).write_bytes(content[: len(content) // 2])
        case _:
            (bundle / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert str(bundle / name) in refused("generate", "a dog", "--model", bundle, "-o", tmp_path / "out")


def test_an_index_that_is_broken_is_refused(refused: Refused, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    (bundle / "model_index.json").write_text("{")
    for command in (["generate", "a dog", "-o", tmp_path / "out", "--model"], ["info"]):
        assert "model_index.json is not valid JSON" in refused(*command, bundle)


def test_an_output_that_cannot_be_written_is_refused(refused: Refused, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    draw = ["generate", "a dog", *SMALL, "--model", tiny_bundle]
    assert "cannot write the output folder" in refused(*draw, "-o", tmp_path / "file" / "out")
    assert "cannot write the output folder" in refused(*draw, "-o", tmp_path / "file")


def test_what_to_draw_must_be_given_once(refused: Refused, draw: list[object], tmp_path: Path) -> None:
    assert "there is nothing to draw" in refused(*draw)
    assert "leave the prompts out" in refused(*draw, "a dog", "--replay", tmp_path / "x.png")
    assert "x.png" in refused(*draw, "--replay", tmp_path / "x.png")
    assert "does not carry its origin" in refused(*draw, "--replay", picture(tmp_path / "plain.png"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "has no prompts"),
        (b'{"text": "a dog"}', "has no prompt"),
        (b"a dog", "is not valid JSON"),
        (b"\xff", "not UTF-8"),
        (b'"a dog"\n{"prompt": ""}', "prompt 2 of 2: the prompt is empty"),
    ],
)
def test_a_wrong_file_of_prompts_is_refused(
    refused: Refused, draw: list[object], tmp_path: Path, content: bytes, sentence: str
) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(content)
    assert sentence in refused(*draw, "--prompts", tmp_path / "prompts.jsonl")


def test_pictures_are_ranked(ran: Ran, tiny_bundle: Path, tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{colour}.png", colour) for colour in ("red", "green", "blue")]
    for model in (tiny_bundle, tiny_bundle / "reranker"):
        ranked = json.loads(ran("rerank", "a red square", *paths, "--model", model, "--json"))["results"]
        scores = [place["score"] for place in ranked]
        assert scores == sorted(scores, reverse=True) and {place["image"] for place in ranked} == {*map(str, paths)}
    assert (
        ran("rerank", "a red square", *paths, "--model", tiny_bundle).splitlines()[1].split()[2] == ranked[0]["image"]
    )


def test_what_cannot_be_ranked_is_refused(refused: Refused, tiny_bundle: Path, tmp_path: Path) -> None:
    red = picture(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(red.read_bytes()[:50])
    rerank = ["rerank", "--model", tiny_bundle]
    assert "the prompt is empty" in refused(*rerank, "", red)
    assert "gone.png does not exist" in refused(*rerank, "a dog", red, tmp_path / "gone.png")
    assert "broken.png is not a readable picture" in refused(*rerank, "a dog", red, tmp_path / "broken.png")
    assert "Is a directory" in refused(*rerank, "a dog", tmp_path)
    assert "Missing argument" in refused(*rerank, "a dog")
    assert "ViT-B-33" in refused("rerank", "a dog", red, "--model", "ViT-B-33")


# tessera train, encode, bundle, info, evaluate: the whole walk on eight pictures --------------------------------------

RUN = {"steps": 2, "batch_size": 4, "checkpoint_every": 2, "sample_every": 2, "log_every": 1}


def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    """A recipe for each part, tiny, all below `folder`."""
    data = {"folder": str(folder / "data")}
    tokens = str(folder / "text_tokenizer")
    trunk = {"channels": 16, "multipliers": [1, 2], "encoder_blocks": 1, "decoder_blocks": 1, "latent_dim": 4}
    vision = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "width": 32, "heads": 2, "layers": 1}
    return {
        "text-tokenizer": {"data": data, "vocab_size": 280, "output": tokens},
        "tokenizer": {
            "data": data,
            "model": {
                "image_size": 16,
                "trunk": {**trunk, "norm_groups": 8},
                "bottleneck": {"type": "vq", "codebook_size": 16},
            },
            "loss": {"adversarial_weight": 0},
            "run": {**RUN, "output": str(folder / "tokenizer")},
        },
        "encode": {
            "data": data,
            "image_tokenizer": str(folder / "tokenizer" / "model"),
            "output": str(folder / "codes"),
        },
        "prior": {
            "codes": str(folder / "codes"),
            "text_tokenizer": tokens,
            "model": {"text_length": 24, "dim": 16, "depth": 1, "num_heads": 2},
            "run": {**RUN, "output": str(folder / "prior")},
        },
        "reranker": {
            "data": data,
            "text_tokenizer": tokens,
            "model": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text},
            "run": {**RUN, "output": str(folder / "reranker")},
        },
    }


def write_recipe(folder: Path, part: str) -> Path:
    path = folder / f"{part}.yaml"
    path.write_text(yaml.safe_dump(recipes(folder)[part]), "utf-8")
    return path


def write_data(folder: Path, pictures: int = 8, captions: bool = True) -> Path:
    colours = ["red", "green", "blue", "white", "black", "yellow", "pink", "gray"]
    for i in range(pictures):
        picture(folder / f"{i}.png", colours[i % 8])
        if captions:
            (folder / f"{i}.txt").write_text(f"a {colours[i % 8]} square", "utf-8")
    return folder


def command(part: str) -> list[str]:
    return ["encode"] if part == "encode" else ["train", part]


def test_the_whole_walk_from_pictures_to_pictures(ran: Ran, tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    for part in ("text-tokenizer", "tokenizer", "encode", "prior", "reranker"):
        path = ran(*command(part), write_recipe(tmp_path, part)).strip()
        assert Path(path).is_dir()
    parts = {
        "--image-tokenizer": tmp_path / "tokenizer" / "model",
        "--text-tokenizer": tmp_path / "text_tokenizer",
        "--prior": tmp_path / "prior" / "model",
        "--reranker": tmp_path / "reranker" / "model",
    }
    bundle = tmp_path / "bundle"
    ran("bundle", bundle, *(word for pair in parts.items() for word in pair), "--top-k", "8")
    drawn = json.loads(ran("generate", "a red square", *SMALL, "--model", bundle, "-o", tmp_path / "out", "--json"))
    assert Image.open(drawn["prompts"][0]["images"][0]["path"]).size == (16, 16)

    kinds = {
        "data": "data", "tokenizer": "training run", "tokenizer/model": "image tokenizer", "codes": "codes",
        "prior/model": "prior", "reranker/model": "reranker", "text_tokenizer": "text tokenizer", "bundle": "bundle",
    }  # fmt: skip
    described = {folder: json.loads(ran("info", tmp_path / folder, "--json")) for folder in kinds}
    assert {folder: report["kind"] for folder, report in described.items()} == kinds
    assert described["tokenizer"]["checkpoints"] == [2] and described["codes"]["rows"] == 8
    assert described["bundle"]["sampling"]["top_k"] == 8
    for part in ("tokenizer", "prior", "reranker"):
        assert described[f"{part}/model"]["parameters"] > 1000
    assert "parameters" in ran("info", bundle)

    report = json.loads(ran("evaluate", "tokenizer", parts["--image-tokenizer"], tmp_path / "data", "--json"))
    assert report["pictures"] == 8 and 0 < report["codes_used"] <= 1 and report["psnr"] > 0


@pytest.mark.parametrize("part", ["text-tokenizer", "tokenizer", "encode", "prior", "reranker"])
def test_an_unknown_key_suggests_the_nearest_name(refused: Refused, tmp_path: Path, part: str) -> None:
    key = {"text-tokenizer": "vocab_size", "tokenizer": "run.steps", "encode": "shard_rows", "prior": "run.seed"}
    asked, wanted = key.get(part, "optimizer.learning_rate"), key.get(part, "optimizer.learning_rate").split(".")[-1]
    path = write_recipe(tmp_path, part)
    assert f"did you mean '{wanted}'?" in refused(*command(part), path, f"{asked}s=1")
    assert "is not a file" in refused(*command(part), tmp_path / "none.yaml")
    assert "must look like key.sub=value" in refused(*command(part), path, "steps")


@pytest.mark.parametrize("part", ["text-tokenizer", "tokenizer", "reranker"])
def test_training_on_a_folder_without_pictures_is_refused(refused: Refused, tmp_path: Path, part: str) -> None:
    write_tokens(tmp_path)
    path = write_recipe(tmp_path, part)
    assert "is not a folder" in refused(*command(part), path)
    (tmp_path / "data").mkdir()
    assert "has no pictures" in refused(*command(part), path)


@pytest.mark.parametrize("part", ["text-tokenizer", "reranker"])
def test_training_without_captions_is_refused(refused: Refused, tmp_path: Path, part: str) -> None:
    write_tokens(tmp_path)
    write_data(tmp_path / "data", captions=False)
    assert "has pictures but no captions" in refused(*command(part), write_recipe(tmp_path, part))


@pytest.mark.parametrize("part", ["tokenizer", "reranker"])
def test_training_on_broken_pictures_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, part: str) -> None:
    write_tokens(tmp_path)
    for path in write_data(tmp_path / "data").glob("*.png"):
        path.write_bytes(path.read_bytes()[:40])
    assert cli.main([*command(part), str(write_recipe(tmp_path, part))]) == 2
    out, error = capsys.readouterr()
    assert out == "" and "is not a readable picture" in error
    assert error.splitlines()[-1].startswith("tessera: error: ")
    assert not list(tmp_path.rglob("*.safetensors"))


def write_tokens(folder: Path) -> None:
    from tessera.text import TextTokenizer

    TextTokenizer.train(["a red square"], 280).save_pretrained(folder / "text_tokenizer")


def test_a_run_folder_that_cannot_be_written_is_refused(refused: Refused, tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    (tmp_path / "file").write_text("in the way")
    path = write_recipe(tmp_path, "tokenizer")
    assert "cannot write the folder" in refused("train", "tokenizer", path, f"run.output={tmp_path}/file/run")


def test_parts_that_do_not_belong_together_are_refused(refused: Refused, tiny_parts: Path, tmp_path: Path) -> None:
    write_tokens(tmp_path)
    parts = {"--image-tokenizer": "image_tokenizer", "--prior": "prior"}
    given = [word for option, name in parts.items() for word in (option, tiny_parts / name)]
    sentence = refused("bundle", tmp_path / "bundle", *given, "--text-tokenizer", tmp_path / "text_tokenizer")
    assert "was trained with text tokenizer" in sentence
    taken = refused("bundle", tmp_path, *given, "--text-tokenizer", tiny_parts / "text_tokenizer")
    assert "exists and is not a bundle" in taken


def test_info_refuses_what_it_does_not_know(refused: Refused, tiny_parts: Path, tmp_path: Path) -> None:
    assert "is not a bundle, a part of one" in refused("info", tmp_path)
    shutil.copytree(tiny_parts / "prior", tmp_path / "prior")
    weights = tmp_path / "prior" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "is not a whole safetensors file" in refused("info", tmp_path / "prior")
    (tmp_path / "prior" / "config.json").write_text("[]")
    assert "must hold a JSON object" in refused("info", tmp_path / "prior")


def test_evaluation_of_a_tokenizer_refuses_wrong_folders(refused: Refused, tiny_parts: Path, tmp_path: Path) -> None:
    assert "has no pictures" in refused("evaluate", "tokenizer", tiny_parts / "image_tokenizer", tmp_path)
    assert "has no config.json" in refused("evaluate", "tokenizer", tmp_path, write_data(tmp_path / "data"))


# tessera evaluate pipeline --------------------------------------------------------------------------------------------


@pytest.fixture
def evaluation(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A recipe that asks for two discs, of which the judge knows one."""
    references = tmp_path / "references"
    references.mkdir()
    Image.new("RGBA", (136, 136), (200, 30, 30, 255)).save(references / "disc.png")
    (references / "metadata.jsonl").write_text('{"file_name": "disc.png", "item": "disc", "concept": "disc"}\n')
    (references / "colours.json").write_text('{"white": [255, 255, 255]}')
    region = {"box": [0, 0, 1, 1], "item": "disc", "concept": "disc"}
    lines = [{"prompt": text, "split": "seen", "regions": [region], "background": None} for text in ("a disc", "disc")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    names = {"prompts": "prompts.jsonl", "references": "references", "output": "evaluation"}
    recipe = {key: str(tmp_path / name) for key, name in names.items()}
    recipe["judge"] = str(ROOT / "recipes" / "emoji" / "judge.py")
    path = tmp_path / "evaluate.yaml"
    path.write_text(yaml.safe_dump({**recipe, "model": str(tiny_bundle), "num_candidates": 2, "device": "cpu"}))
    return path


def test_a_pipeline_is_measured_and_goes_on(ran: Ran, refused: Refused, evaluation: Path) -> None:
    figures = json.loads(ran("evaluate", "pipeline", evaluation, "--json"))
    assert figures["splits"]["seen"]["prompts"] == 2 and figures["num_candidates"] == 2
    again = json.loads(ran("evaluate", "pipeline", evaluation, "--json"))
    assert again["splits"] == figures["splits"] and again["images_per_second"] is None
    assert "seen" in ran("evaluate", "pipeline", evaluation)
    assert "with other settings" in refused("evaluate", "pipeline", evaluation, "sampling.temperature=0.5")
    assert "with other settings" in refused("evaluate", "pipeline", evaluation, "likelihood_weight=0.5")


def test_a_wrong_evaluation_is_refused(refused: Refused, evaluation: Path, tmp_path: Path) -> None:
    measure = ["evaluate", "pipeline", evaluation]
    assert "did you mean 'num_candidates'?" in refused(*measure, "num_candidate=3")
    assert "did you mean 'top_k'?" in refused(*measure, "sampling.topk=3")
    assert "cannot read " in refused(*measure, f"prompts={tmp_path}/none.jsonl")
    assert "holds no references" in refused(*measure, f"references={tmp_path}")
    assert "there is no bundle" in refused(*measure, "model=emojo")
    assert "name the recipe's judge, a Python file" in refused(*measure, "judge=none.py")
    for content, fault in (("", "AttributeError"), ("1 / 0", "ZeroDivisionError"), ("def", "SyntaxError")):
        (tmp_path / "wrong.py").write_text(content)
        assert f"wrong.py cannot be used: {fault}" in refused(*measure, "judge=wrong.py")
