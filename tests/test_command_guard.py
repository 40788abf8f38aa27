"""The command line where users are: locales, home folders, files without permission, a SIGTERM, files in the way."""

import ast
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from pipelines import cli
from pipelines.cli.app import weighted
from pipelines.info import describe
from pipelines.text_to_image import TextToImagePipeline
from stage1_tokenizer.evaluate import evaluate
from stage1_tokenizer.reconstruct import reconstruct
from stage2_prior.lora import Loras, base_fingerprint, read_lora
from tessera.config import Config, read_recipe
from tessera.errors import InputError, WriteError, nearest, reason
from tessera.images import save_png, written_by_tessera
from tessera.paths import expand, is_file

ROOT = Path(__file__).resolve().parent.parent
POSIX_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def tessera(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The command in a process of its own; what it writes stays bytes."""
    command = [sys.executable, "-m", "tessera", *map(str, arguments)]
    with_path = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, cwd=cwd, env=with_path, stdin=subprocess.DEVNULL)


def generating(bundle: Path, *arguments: object) -> list[object]:
    return ["generate", *arguments, "--model", bundle, "--device", "cpu", "--candidates", 1, "-n", 1, "-o", "out"]


# Locales --------------------------------------------------------------------------------------------------------------


def test_a_terminal_that_lacks_the_letters_loses_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    done = tessera(*generating(tiny_bundle, "a cat 猫"), cwd=tmp_path, PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr
    assert b"a cat \\u732b" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a-cat-猫-1-seed0.png",
        "a-cat-猫-candidates.png",
    ]
    done = tessera(*generating(tiny_bundle, "a cat 猫"), "--json", cwd=tmp_path, PYTHONIOENCODING="cp1252")
    assert done.returncode == 0 and json.loads(done.stdout)["prompts"][0]["prompt"] == "a cat 猫"


def test_the_locale_c_reads_prompts_and_names_as_utf_8(tiny_bundle: Path, tmp_path: Path) -> None:
    done = tessera(*generating(tiny_bundle, "红心", "--json"), cwd=tmp_path, **POSIX_LOCALE)
    assert done.returncode == 0, done.stderr
    drawn = json.loads(done.stdout)["prompts"][0]
    assert drawn["prompt"] == "红心" and (tmp_path / "out" / "红心-1-seed0.png").is_file()
    file = tmp_path / "out" / "红心-1-seed0.png"
    done = tessera("rerank", "红心", file, "--model", tiny_bundle, cwd=tmp_path, **POSIX_LOCALE)
    assert done.returncode == 0 and os.fsencode(file) in done.stdout, done.stderr


def test_every_file_is_opened_in_a_named_encoding() -> None:
    """By the syntax tree: what a locale decides is broken on somebody's machine."""
    unnamed = []
    folders = ("tessera", "stage1_tokenizer", "stage2_prior", "rerank", "pipelines", "recipes", "benchmarks")
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            named = {keyword.arg: keyword.value for keyword in node.keywords}
            texts = [one.value for one in [*node.args, *named.values()] if isinstance(one, ast.Constant)]
            binary = any(isinstance(text, str) and "b" in text and len(text) <= 3 for text in texts)
            if isinstance(node.func, ast.Attribute):  # also readers of our own are called read_text
                opens = name in ("read_text", "write_text")
            else:
                opens = name == "open"
            if (opens and not binary and "encoding" not in named and "utf-8" not in texts) or (
                getattr(named.get("text"), "value", False) is True
            ):
                unnamed.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not unnamed


# Paths ----------------------------------------------------------------------------------------------------------------


class Recipe(Config):
    output: Path
    other: Path | None = None


def test_the_home_folder_is_expanded_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (home / "recipe.yaml").write_text("output: ~/run\n", encoding="utf-8")
    recipe = read_recipe(Recipe, "~/recipe.yaml", ["other=~/x"])
    assert (recipe.output, recipe.other) == (home / "run", home / "x")
    with pytest.raises(InputError, match="output: .*the home folder of that user is not known"):
        read_recipe(Recipe, "~/recipe.yaml", ["output=~nobody-of-that-name/x"])
    (here / "~backup").mkdir()
    assert expand("~backup/x") == Path("~backup/x")

    (home / "tiny").symlink_to(tiny_bundle)
    Image.new("RGB", (16, 16)).save(home / "a.png")
    assert TextToImagePipeline.from_pretrained("~/tiny", device="cpu", rerank=False).fingerprint
    assert cli.main([str(a) for a in generating(Path("~/tiny"), "a dog")[:-1]] + ["~/out"]) == 0
    assert cli.main(["reconstruct", "~/a.png", "--model", "~/tiny/image_tokenizer", "--out", "~/out"]) == 0
    assert cli.main(["rerank", "a dog", "~/a.png", "--model", "~/tiny"]) == 0
    assert cli.main(["info", "~/tiny"]) == 0
    assert len(list((home / "out").iterdir())) == 3 and [path.name for path in here.iterdir()] == ["~backup"]


def test_a_path_that_cannot_be_is_one_sentence() -> None:
    with pytest.raises(InputError, match="File name too long"):
        is_file("x" * 5000)
    with pytest.raises(InputError, match="is no path"):
        is_file("a\0b")
    assert not is_file("no/such/file") and not is_file(Path(__file__) / "below a file")


def test_what_must_not_be_read_is_told_apart_from_what_is_not_there(tiny_bundle: Path, tmp_path: Path) -> None:
    """Also by root, who may read all: then without that right."""
    without = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may read everything, and there is no setpriv to take that right away")
        rights = "-dac_override,-dac_read_search"
        without = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"]
    shut = tmp_path / "shut"
    (shut / "lora").mkdir(parents=True)
    for name in (
        "recipe.yaml",
        "prompts.jsonl",
        "a.png",
        "config.json",
        "lora/adapter_config.json",
        "lora/adapter_model.safetensors",
    ):
        (shut / name).write_text("{}", encoding="utf-8")
    code = f"""
from pipelines import cli
import stage2_prior.train_text, pipelines.output, pipelines.info, pipelines.rank, stage2_prior.lora
for command in (["train", "text-tokenizer", "{shut}/recipe.yaml"], ["generate", "--prompts", "{shut}/prompts.jsonl"],
                ["generate", "--replay", "{shut}/a.png"], ["rerank", "a dog", "{shut}/a.png"], ["info", "{shut}"],
                ["merge", "emoji", "--lora", "{shut}/lora", "--out", "/nonexistent/x"]):
    print(cli.main(command))
"""
    for way in ("folder", "files"):
        (shut / "lora" / "adapter_config.json").chmod(0o000 if way == "files" else 0o644)
        for path in shut.glob("*.*"):
            path.chmod(0o000 if way == "files" else 0o644)
        shut.chmod(0o000 if way == "folder" else 0o755)
        command = [*without, sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        shut.chmod(0o755)
        said = done.stderr.decode().splitlines()
        assert done.stdout.split() == [b"2"] * 6, said
        told = re.compile(r"cannot read .*: Permission denied|[Pp]ath '.*' is not readable")  # the second is typer's
        assert len(said) == 6 and all(told.search(line) for line in said), said


# Ends -----------------------------------------------------------------------------------------------------------------


def test_sigterm_leaves_no_part_and_ends_with_143(tiny_bundle: Path, tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from pathlib import Path
from PIL import Image
from pipelines import cli
usual = Image.Image.save
def save(self, path, *arguments, **named):
    usual(self, path, *arguments, **named)
    os.kill(os.getpid(), signal.SIGTERM)  # while the file has its temporary name
Image.Image.save = save
sys.exit(cli.main({[str(one) for one in generating(tiny_bundle, "a dog")]!r}))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (143, b"", b"")
    assert not (tmp_path / "out").exists()


def test_an_own_way_with_sigterm_is_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["--help"]) == 0 and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PermissionError(13, "Permission denied", "a.json"), 2, "error: a.json cannot be read (Permission denied)"),
        (IsADirectoryError(21, "Is a directory", "a"), 2, "error: a cannot be read (Is a directory)"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), 2, "cannot be read (UnicodeDecodeError"),
        (json.JSONDecodeError("Expecting value", "", 0), 2, "cannot be read (JSONDecodeError: Expecting value"),
        (yaml.YAMLError("odd"), 2, "cannot be read (YAMLError: odd)"),
        (RecursionError("too deep"), 2, "cannot be read (RecursionError: too deep)"),
        (MemoryError(), 2, "cannot be read (MemoryError: MemoryError)"),
        (EOFError(), 2, "cannot be read (EOFError"),
        (WriteError("a.png could not be written: the disk is full"), 1, "failed: a.png could not be written"),
        (
            RuntimeError("in /usr/lib/python3/site-packages/torch/x.py: bad"),
            1,
            "failed: RuntimeError: in (a library) bad",
        ),
        (RuntimeError("Weights only load failed, set weights_only=False"), 1, "something other than tensors"),
    ],
)
def test_what_comes_from_the_depths_is_one_line(
    error: Exception, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_down(*_: object) -> None:
        raise error

    monkeypatch.setattr("pipelines.info.describe", break_down)
    assert cli.main(["info", "x"]) == code
    out, line = capsys.readouterr()
    assert out == "" and said in line and line.count("\n") == 1
    assert "site-packages" not in line and "weights_only" not in line


def test_warnings_of_libraries_have_no_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(*_: object) -> dict[str, Any]:
        for text, kind in (("old", FutureWarning), ("see /x/site-packages/y.py for it", UserWarning)):
            warnings.warn(text, kind, stacklevel=1)
        return {"warned": ["a", 1]}

    monkeypatch.setattr("pipelines.info.describe", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["info", "x"]) == 0
    assert capsys.readouterr().err == "tessera: warning: see (a library) for it\n"


def test_reasons_are_short() -> None:
    assert reason(ValueError("x" * 500)) == "x" * 237 + "..." and reason(KeyError()) == "KeyError"


def test_names_are_near_whatever_their_case() -> None:
    assert nearest("vit-b-32", ["ViT-B-16", "ViT-B-32"]) == ", did you mean 'ViT-B-32'?"
    assert nearest("VIT_L_14", ["ViT-L-14", "RN50"]) == ", did you mean 'ViT-L-14'?"
    assert nearest("xyz", ["b", "a"]) == "; known are a, b"


# Files in the way -----------------------------------------------------------------------------------------------------


def test_reconstruct_overwrites_its_own_pictures_alone(tiny_parts: Path, tmp_path: Path) -> None:
    photo = tmp_path / "a.png"
    Image.new("RGB", (16, 16), "red").save(photo)
    out = tmp_path / "out"
    out.mkdir()
    Image.new("RGB", (3, 3)).save(out / "0000-a.png")
    before = (out / "0000-a.png").read_bytes()
    for _ in range(2):
        (result,) = reconstruct([photo], tiny_parts / "image_tokenizer", out)
        assert result.path == str(out / "0000-a (2).png") and written_by_tessera(result.path)
    assert (out / "0000-a.png").read_bytes() == before and len(list(out.iterdir())) == 2


def test_generate_overwrites_no_picture_of_others(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a-dog-1-seed0.png").symlink_to("nowhere")
    save_png(Image.new("RGB", (4, 4)), tmp_path / "a-dog-candidates.png")
    before = (tmp_path / "a-dog-candidates.png").read_bytes()
    assert cli.main([str(one) for one in generating(tiny_bundle, "a dog")[:-1]] + [str(tmp_path)]) == 0
    assert (tmp_path / "a-dog-1-seed0.png").is_symlink() and not (tmp_path / "a-dog-1-seed0.png").exists()
    assert (tmp_path / "a-dog-candidates.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 4


def test_figures_of_each_picture_overwrite_nothing_else(tiny_parts: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (16, 16), "red").save(data / "a.png")
    figures, other = tmp_path / "figures.jsonl", data / "metadata.jsonl"
    other.write_text('{"file_name": "a.png", "text": "red"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="metadata.jsonl is there and no evaluation wrote it; choose another file"):
        evaluate(tiny_parts / "image_tokenizer", data, per_image=other)
    with pytest.raises(InputError, match="no evaluation wrote it"):
        evaluate(tiny_parts / "image_tokenizer", data, per_image=data / "a.png")
    for _ in range(2):
        evaluate(tiny_parts / "image_tokenizer", data, per_image=figures)
    assert json.loads(figures.read_text(encoding="utf-8"))["file_name"] == "a.png"


# LoRA and runs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora(tiny_pipeline: TextToImagePipeline, tmp_path: Path) -> Path:
    prior, folder = tiny_pipeline.prior, tmp_path / "lora"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "revision": base_fingerprint(prior)}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    name = next(name for name, _ in prior.named_parameters() if name.endswith("attention.out.weight"))
    layer = f"base_model.model.{name.removesuffix('.weight')}.lora_"
    out, inside = prior.get_parameter(name).shape
    state = {f"{layer}A.weight": torch.full((2, inside), 0.1), f"{layer}B.weight": torch.full((out, 2), 0.1)}
    save_file(state, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("half", ["A", "B"])
def test_a_lora_that_is_not_finite_is_refused(lora: Path, value: float, half: str) -> None:
    state = load_file(lora / "adapter_model.safetensors")
    state[next(name for name in state if f"lora_{half}" in name)][0, 0] = value
    save_file(state, lora / "adapter_model.safetensors")
    with pytest.raises(InputError, match="the weights of '.*attention.out' are not finite; restore the file"):
        read_lora(lora)


@pytest.mark.parametrize("weight", [1e39, -1e300, 1e7])
def test_a_lora_whose_sum_overflows_leaves_the_prior_as_it_was(
    lora: Path, weight: float, tiny_pipeline: TextToImagePipeline
) -> None:
    prior = copy.deepcopy(tiny_pipeline.prior)
    if weight == 1e7:
        prior.half()
        config = json.loads((lora / "adapter_config.json").read_text(encoding="utf-8"))
        config["revision"] = base_fingerprint(prior)
        (lora / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    loras, before = Loras(prior), {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    with pytest.raises(InputError, match="the weights of '.*attention.out' are no longer finite in float"):
        loras.add(lora, weight)
    assert loras.applied == [] and all(torch.equal(before[name], now) for name, now in prior.state_dict().items())


def test_a_lora_is_given_by_its_file_too(lora: Path, tmp_path: Path) -> None:
    file = lora / "adapter_model.safetensors"
    assert read_lora(file).fingerprint == read_lora(lora).fingerprint
    assert weighted([str(file), f"{file}:0.5"]) == [(str(file), 1.0), (str(file), 0.5)]
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"x.safetensors is a file; give the folder of a LoRA, with adapter_config"):
        read_lora(tmp_path / "x.safetensors")


def test_a_run_is_described_however_it_was_left(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "recipe.yaml").write_text("x: 1\n", encoding="utf-8")
    for name in ("step-0000003.pt", "step-best.pt", "step-0000006.part", "notes.txt"):
        (tmp_path / "checkpoints" / name).touch()
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 1.5}\n{"step": 3, "lo', encoding="utf-8")
    (tmp_path / "lost").symlink_to("nowhere")
    report = describe(tmp_path)
    assert report["checkpoints"] == [3] and report["newest_figures"] == {"step": 2, "loss": 1.5}
