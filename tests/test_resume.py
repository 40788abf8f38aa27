"""What a run resumes from: the same recipe and data or not at all, the newest whole checkpoint, and no step twice."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import rerank.train
import stage1_tokenizer.train
import stage2_prior.encode
import stage2_prior.finetune
import stage2_prior.train
import stage2_prior.train_text
from tessera.data.loader import check_shared_memory, step_loader
from tessera.data.source import Steps
from tessera.errors import InputError, WriteError
from tessera.images import written_by_tessera
from tessera.training import checkpoint
from tessera.training.run import Run

RUN = {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "sample_every": 4, "log_every": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with captions and a recipe of each stage at toy size, all trained once."""
    root = tmp_path_factory.mktemp("world")
    random, rows = np.random.default_rng(0), []
    (root / "data").mkdir()
    for i in range(8):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(root / "data" / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"a picture {i}"})
    (root / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data: dict[str, Any] = {"data": {"folder": str(root / "data")}}
    trunk = {"channels": 8, "multipliers": [1, 2], "encoder_blocks": 1, "decoder_blocks": 1, "patch_size": 2,
             "latent_dim": 4, "norm_groups": 4}  # fmt: skip
    recipes = {
        "text": data | {"vocab_size": 270, "output": str(root / "text")},
        "tokenizer": data | {"model": {"image_size": 16, "trunk": trunk,
                                       "bottleneck": {"type": "vq-ema", "codebook_size": 32}},
                             "loss": {"adversarial_weight": 0.0}, "run": RUN},
        "reranker": data | {"text_tokenizer": str(root / "text"), "run": RUN, "model": {
            "embed_dim": 8, "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 1},
            "vision_cfg": {"image_size": 16, "layers": 1, "width": 8, "head_width": 8, "patch_size": 8}}},
        "encode": data | {"image_tokenizer": str(root / "tokenizer" / "model"), "output": str(root / "codes")},
        "prior": {"codes": str(root / "codes"), "text_tokenizer": str(root / "text"),
                  "image_tokenizer": str(root / "tokenizer" / "model"), "run": RUN,
                  "model": {"text_length": 12, "dim": 16, "depth": 1, "num_heads": 2}},
        "lora": {"prior": str(root / "prior" / "model"), "codes": str(root / "codes"), "run": RUN,
                 "lora": {"rank": 2, "alpha": 4, "targets": ["q"]}},
    }  # fmt: skip
    for name, recipe in recipes.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    stage2_prior.train_text.train(root / "text.yaml")
    train(root, "tokenizer", root / "tokenizer")
    stage2_prior.encode.encode(root / "encode.yaml")
    train(root, "prior", root / "prior")
    train(root, "lora", root / "lora")
    train(root, "reranker", root / "reranker")
    return root


def train(world: Path, stage: str, output: Path, *overrides: str) -> Path:
    run = {
        "tokenizer": stage1_tokenizer.train.train,
        "prior": stage2_prior.train.train,
        "reranker": rerank.train.train,
        "lora": stage2_prior.finetune.finetune,
    }[stage]
    return run(world / f"{stage}.yaml", [f"run.output={output}", *overrides])


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def copied(world: Path, tmp_path: Path) -> Path:
    """The runs of the world, to be changed."""
    for stage in ("tokenizer", "prior", "reranker", "lora"):
        shutil.copytree(world / stage, tmp_path / stage)
    return tmp_path


# With another recipe --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "change", "sentence"),
    [
        ("tokenizer", "model.image_size=32", "model.image_size has changed: it was 16 when .* and is 32 now"),
        ("tokenizer", "run.seed=9", "run.seed has changed: it was 0 .* 9 now"),
        ("tokenizer", "run.batch_size=2", "run.batch_size has changed: it was 4 .* 2 now"),
        ("tokenizer", "loss.l1_weight=0.5", "loss.l1_weight has changed"),
        ("tokenizer", "optimizer.learning_rate=0.1", "optimizer.learning_rate has changed"),
        ("tokenizer", "run.ema_decay=0.5", "run.ema_decay has changed: it was 0.999 .* 0.5 now"),
        ("tokenizer", "model.bottleneck={type: fsq, levels: [8, 5, 5, 5]}", 'model.bottleneck.type .*"vq-ema".*"fsq"'),
        ("tokenizer", "data.split=null", "data.split has changed"),
        ("prior", "text_weight=0.5", "text_weight has changed: it was 0.125 .* 0.5 now"),
        ("prior", "condition_dropout=0.5", "condition_dropout has changed"),
        ("lora", "lora.targets=[v]", r'lora.targets has changed: it was \["q"\] .* \["v"\] now'),
        ("reranker", "wrong_captions=2", "wrong_captions has changed"),
        ("reranker", "model.embed_dim=16", "model has changed"),
    ],
)
def test_another_recipe_is_refused_and_nothing_is_written(
    world: Path, copied: Path, stage: str, change: str, sentence: str
) -> None:
    before = snapshot(copied)
    with pytest.raises(InputError, match=sentence):
        train(world, stage, copied / stage, change, "run.steps=9")
    assert snapshot(copied) == before


def test_what_may_change_does(world: Path, copied: Path) -> None:
    harmless = ["run.steps=6", "run.checkpoint_every=3", "run.keep_checkpoints=1", "run.log_every=2",
                "run.sample_every=6", "prompts=[a picture 3]", "sampling.top_k=3", "activation_checkpointing=true",
                "image_tokenizer=null"]  # fmt: skip
    train(world, "prior", copied / "prior", *harmless)
    assert [path.name for path in (copied / "prior" / "checkpoints").iterdir()] == ["step-0000006.pt"]
    keys = {key.partition(".")[0] for key in checkpoint.MAY_CHANGE}
    assert keys <= {"run", "activation_checkpointing", "prompts", "sampling", "data", "loss"}


def test_other_data_and_other_parts_are_refused(world: Path, copied: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(world / "data", tmp_path / "data"))
    moved = f"data.folder={data}"
    train(world, "tokenizer", copied / "tokenizer", moved, "run.steps=5")  # the same, elsewhere
    Image.new("RGB", (16, 16)).save(data / "3.png")
    before = snapshot(copied)
    for stage in ("tokenizer", "reranker"):
        with pytest.raises(InputError, match=r"data.folder has changed: it was 8 pictures \(fingerprint \w+\) .* now"):
            train(world, stage, copied / stage, moved, "run.steps=9")

    stage2_prior.encode.encode(world / "encode.yaml", [f"output={tmp_path}/codes", moved])
    with pytest.raises(InputError, match=r"codes has changed: it was 8 rows \(fingerprint \w+\)"):
        train(world, "prior", copied / "prior", f"codes={tmp_path}/codes", "run.steps=9")
    text = stage2_prior.train_text.train(world / "text.yaml", ["vocab_size=265", f"output={tmp_path}/text"])
    with pytest.raises(InputError, match="text_tokenizer has changed"):
        train(world, "prior", copied / "prior", f"text_tokenizer={text}", "run.steps=9")
    other = train(world, "prior", tmp_path / "other", "run.seed=7")
    with pytest.raises(InputError, match="prior has changed"):
        train(world, "lora", copied / "lora", f"prior={other}", "run.steps=9")
    with pytest.raises(InputError, match="what is trained has changed: it was prior .* and is finetune now"):
        train(world, "lora", copied / "prior", "run.steps=9")
    with pytest.raises(InputError, match="prior has changed: it was null"):
        train(world, "prior", copied / "prior", f"prior={other}", "run.steps=9")
    after = snapshot(copied)
    assert {name: after[name] for name in before} == before


def test_checkpoints_of_earlier_releases_are_resumed(world: Path, copied: Path) -> None:
    for path in (copied / "prior" / "checkpoints").iterdir():
        content = torch.load(path, weights_only=True)
        del content["identity"]
        torch.save(content, path)
    train(world, "prior", copied / "prior", "run.steps=6")
    assert (copied / "prior" / "checkpoints" / "step-0000006.pt").is_file()


# Damaged --------------------------------------------------------------------------------------------------------------


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def overwritten(path: Path) -> None:
    path.write_bytes(b"\x19" * path.stat().st_size)


def one_bit(path: Path) -> None:
    """Flips a bit of the largest tensor, which torch itself does not notice."""
    with zipfile.ZipFile(path) as file:
        entry = max(file.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[entry.header_offset + 200 + entry.file_size // 2] ^= 1
    path.write_bytes(bytes(content))


def a_list(path: Path) -> None:
    torch.save([1], path)


@pytest.mark.parametrize("damage", [cut_off, emptied, overwritten, one_bit, a_list])
@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_the_checkpoint_before_a_damaged_one_is_used(
    world: Path, copied: Path, capsys: pytest.CaptureFixture[str], stage: str, damage: Any
) -> None:
    damage(copied / stage / "checkpoints" / "step-0000004.pt")
    capsys.readouterr()
    resumed = train(world, stage, copied / stage)
    said = capsys.readouterr().err
    assert "step-0000004.pt is damaged (" in said and "the checkpoint before it is used" in said
    assert "step-0000002.pt after 2 of 4 steps" in said and "weights_only" not in said
    expected = load_file(world / stage / "model" / "model.safetensors")
    for name, weight in load_file(resumed / "model.safetensors").items():
        assert torch.equal(weight, expected[name]), name  # as if nothing had happened


def test_files_of_others_with_a_checkpoint_s_name_are_never_lost(world: Path, copied: Path) -> None:
    folder = copied / "prior" / "checkpoints"
    torch.save({"weights": torch.zeros(2)}, folder / "step-0000001.pt")  # of some other program
    theirs = (folder / "step-0000001.pt").read_bytes()
    (folder / "step-0000006.pt").write_text("precious")  # where one of ours will be written
    train(world, "prior", copied / "prior", "run.steps=8")
    assert (folder / "step-0000001.pt").read_bytes() == theirs
    assert (folder / "step-0000006.pt.damaged").read_text() == "precious"
    assert sorted(path.name for path in folder.glob("*.pt")) == [
        "step-0000001.pt", "step-0000006.pt", "step-0000008.pt",
    ]  # fmt: skip


def test_damaged_checkpoints_alone_are_refused(world: Path, copied: Path) -> None:
    for path in (copied / "prior" / "checkpoints").iterdir():
        cut_off(path)
    before = snapshot(copied)
    with pytest.raises(InputError, match="holds damaged checkpoints alone, step-0000004.pt the newest; remove them"):
        train(world, "prior", copied / "prior", "run.steps=9")
    assert snapshot(copied) == before


def test_other_files_among_the_checkpoints_are_left_alone(world: Path, copied: Path) -> None:
    folder = copied / "tokenizer" / "checkpoints"
    for name in ("step-best.pt", "step-0000001.pt.bak", "notes.txt"):
        (folder / name).write_text("precious")
    train(world, "tokenizer", copied / "tokenizer", "run.steps=8")
    assert sorted(path.name for path in folder.iterdir()) == [
        "notes.txt", "step-0000001.pt.bak", "step-0000006.pt", "step-0000008.pt", "step-best.pt",
    ]  # fmt: skip


# Figures, folders, disks ----------------------------------------------------------------------------------------------


def test_no_step_is_logged_twice(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = Run.update

    def killed(self: Run, *arguments: Any) -> None:
        if self.step == 3:
            raise KeyboardInterrupt
        update(self, *arguments)

    for kill_at_start in (True, False):
        output = tmp_path / str(kill_at_start)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Run, "update", killed)
            train(world, "prior", output, *(["run.checkpoint_every=99"] if kill_at_start else []))
        log = output / "metrics.jsonl"
        assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]
        with log.open("a") as file:
            file.write('{"step": 4, "lo')  # cut short
        train(world, "prior", output)
        assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_checkpoint_is_written_before_samples_are_tried(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    for stage, module, name in (("prior", stage2_prior.train, "sample_images"),
                                ("tokenizer", stage1_tokenizer.train, "_sample"),
                                ("reranker", rerank.train, "retrieval")):  # fmt: skip
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(module, name, broken)
            train(world, stage, tmp_path / stage)
        assert (tmp_path / stage / "checkpoints" / "step-0000004.pt").is_file()
        assert list((tmp_path / stage / "model").glob("*.safetensors"))


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, calls = torch.save, []

    def full_once(content: object, path: Path) -> None:
        calls.append(path)
        if len(calls) == 1:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(content, path)

    monkeypatch.setattr(torch, "save", full_once)
    train(world, "prior", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000004.pt"]
    said = capsys.readouterr().err
    assert "step-0000002.pt could not be written: the disk is full" in said and "training continues" in said

    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(WriteError, match="step-0000004.pt could not be written, the disk was full"):
        train(world, "prior", tmp_path / "full")
    assert not list((tmp_path / "full" / "checkpoints").iterdir())
    assert (tmp_path / "full" / "model" / "config.json").is_file()  # what could be saved was


def test_a_run_s_folder_is_its_own(world: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "model").mkdir(parents=True)
    (project / "model" / "net.py").write_text("precious")
    train(world, "tokenizer", project, "run.steps=2")
    assert (project / "model" / "net.py").read_text() == "precious" and (project / "model" / "config.json").is_file()
    for name, content in (("recipe.yaml", "run: mine"), ("metrics.jsonl", "precious"), ("model/config.json", "{}")):
        folder = tmp_path / name.partition(".")[0].replace("/", "-")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(content)
        with pytest.raises(InputError, match=f"{name} is in the way"):
            train(world, "tokenizer", folder)
        assert snapshot(folder) == {name: content.encode()}
    with pytest.raises(InputError, match="run.output: .* is the data folder"):
        train(world, "tokenizer", world / "data")


def test_two_runs_cannot_share_a_folder(world: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from stage1_tokenizer import train as t; from tessera.training.run import Run\n"
        "update = Run.update\n"
        "def slow(self, *a):\n    update(self, *a); print('running', flush=True); time.sleep(60)\n"
        "Run.update = slow; t.train(sys.argv[1], [f'run.output={sys.argv[2]}'])"
    )
    arguments = [sys.executable, "-c", code, str(world / "tokenizer.yaml"), str(tmp_path / "run")]
    with subprocess.Popen(arguments, stdout=-1, stderr=-1) as first:
        assert first.stdout is not None and first.stdout.readline() == b"running\n"
        before = snapshot(tmp_path)
        with pytest.raises(InputError, match=f"run is in use by process {first.pid} on"):
            train(world, "tokenizer", tmp_path / "run")
        assert snapshot(tmp_path) == before
        first.kill()
    train(world, "tokenizer", tmp_path / "run")  # a dead process keeps nothing


def test_sample_sheets_are_known_as_ours(world: Path) -> None:
    sheets = list(world.glob("*/samples/*.png"))
    assert sheets and all(written_by_tessera(path) for path in sheets)


def test_one_broken_picture_does_not_stop_training(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(world / "data", tmp_path / "data"))
    (data / "5.png").write_bytes(b"broken")
    for stage in ("tokenizer", "reranker"):
        for size in (1, 4):
            overrides = [f"data.folder={data}", "run.steps=40", f"run.batch_size={size}", "run.sample_every=20"]
            train(world, stage, tmp_path / f"{stage}{size}", *overrides, "run.log_every=100")
            said = capsys.readouterr().err
            assert said.count("skipped: ") == 1 and "5.png is not a readable picture" in said
            assert (tmp_path / f"{stage}{size}" / "checkpoints" / "step-0000040.pt").is_file()


# Loaders --------------------------------------------------------------------------------------------------------------


class Failing(Steps):
    def __init__(self, how: str) -> None:
        self.how = how

    def __getitem__(self, step: int) -> Any:
        if step < 2:
            return torch.zeros(1)
        if self.how == "killed":
            import os

            os.kill(os.getpid(), 9)
        raise InputError("0.png is broken; mend it")


@pytest.mark.parametrize(
    ("how", "sentence"),
    [("killed", "a loader process died .*; use fewer run.num_workers, or 0"), ("input", "^0.png is")],
)
def test_a_worker_that_dies_is_one_sentence_within_seconds(how: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as raised:
        list(step_loader(Failing(how), 0, 9, num_workers=1))
    assert "Traceback" not in str(raised.value) and "\n" not in str(raised.value)


def test_shared_memory_is_looked_at_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_shared_memory((torch.zeros(10), "text"), 2, str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(100, 50, 50))
    with pytest.raises(InputError, match=r"run.num_workers=2 needs 0.0 MiB of shared memory .*--shm-size"):
        check_shared_memory((torch.zeros(10), "text"), 2, str(tmp_path))

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(InputError, match=r"cannot be written \(Read-only file system\); mount it writable or use"):
        check_shared_memory(torch.zeros(10), 1, str(tmp_path))


def test_fewer_pictures_in_a_batch_than_processes(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(InputError, match="run.batch_size is 1, but 2 processes share a batch"):
        train(world, "tokenizer", tmp_path / "run", "run.batch_size=1")
    assert not (tmp_path / "run").exists()
