"""Nothing is lost: what Tessera did not write stays, what it writes is whole or not there, one process a folder."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.bundle import INDEX, assemble_bundle, load_bundle
from rerank import ClipReranker
from stage1_tokenizer import Autoencoder
from stage2_prior import load_prior
from tessera.errors import InputError, WriteError
from tessera.text import TextTokenizer
from tessera.weights import writing
from tessera.weights.folder import load_weights, refuse_not_finite
from tessera.weights.lock import FolderLock
from tessera.weights.writing import is_ours, new_file, refuse_foreign, replacing, safetensors_metadata, write_text
from tests.conftest import tiny_autoencoder

FOREIGN = {
    "config.json": '{"model_type": "bert"}',
    "model.safetensors": "precious",
    "tokenizer.json": '{"model": {"vocab": {"a": 0}}}',
    "adapter_config.json": '{"revision": null}',
    "open_clip_config.json": '{"model_cfg": {"text_cfg": {"hf_tokenizer_name": "bert"}}}',
    "model_index.json": '{"_class_name": "StableDiffusionPipeline"}',
}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


Save = Callable[[Path], object]


@pytest.fixture(params=["image tokenizer", "prior", "text tokenizer", "reranker"])
def save(request: pytest.FixtureRequest, tiny_parts: Path) -> Save:
    """Writes a model of each kind to a folder."""
    match request.param:
        case "image tokenizer":
            return Autoencoder.from_pretrained(tiny_parts / "image_tokenizer").save_pretrained
        case "prior":
            return load_prior(tiny_parts / "prior").save_pretrained
        case "text tokenizer":
            return TextTokenizer.from_pretrained(tiny_parts / "text_tokenizer").save_pretrained
        case _:
            return ClipReranker.from_pretrained(tiny_parts / "reranker").save_pretrained


def test_saving_adds_to_a_folder_and_replaces_only_its_own(save: Save, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "model.safetensors").write_text("precious")
    for _ in range(2):  # the second time over its own files
        save(tmp_path)
        kept = snapshot(tmp_path)
        assert kept.pop("thesis.txt") == kept.pop("inner/model.safetensors") == b"precious"
        assert kept and all(is_ours(tmp_path / name) for name in kept)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_in_the_way_is_named_and_nothing_is_touched(save: Save, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FOREIGN[name])
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path / name} is in the way.*choose another folder"):
        save(tmp_path)
    assert snapshot(tmp_path) == before and len(list(tmp_path.iterdir())) == 1


def test_a_folder_of_the_name_is_in_the_way(save: Save, tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match="config.json is in the way: it is a folder"):
        save(tmp_path)


def test_a_link_is_followed_and_stays(save: Save, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "letter").write_text("dear")
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "letter").read_text() == "dear"
    (tmp_path / "nowhere").symlink_to("missing")
    with pytest.raises(InputError, match="a link to nothing"):
        save(tmp_path / "nowhere")
    (tmp_path / "file").write_text("dear")
    with pytest.raises(InputError, match="is a file, not a folder"):
        save(tmp_path / "file")


def test_the_working_folder_can_be_written(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(Path("."))
    assert snapshot(tmp_path)


def test_files_get_the_mode_of_the_umask(save: Save, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save(tmp_path / "public")
        os.umask(0o077)
        save(tmp_path / "private")
    finally:
        os.umask(before)
    for folder, mode in ((tmp_path / "public", 0o644), (tmp_path / "private", 0o600)):
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {mode}


def test_fewer_shards_leave_none_of_the_older(tmp_path: Path, tiny_parts: Path) -> None:
    prior = load_prior(tiny_parts / "prior")
    prior.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    prior.save_pretrained(tmp_path)
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    prior.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    load_prior(tmp_path, TextTokenizer.from_pretrained(tiny_parts / "text_tokenizer"))


def test_an_error_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    tiny_autoencoder().save_pretrained(tmp_path / "model")
    before = snapshot(tmp_path)
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "model") as part:
        (part / "model.safetensors").write_bytes(b"half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "new" / "model"):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), new_file(tmp_path / "file"):
        raise ZeroDivisionError
    assert snapshot(tmp_path) == before and sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_folder_left_half_way_is_refused_and_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_autoencoder().save_pretrained(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        replace = Path.replace

        def killed(self: Path, target: Path) -> Path:
            if self.name == "model.safetensors":
                raise KeyboardInterrupt
            return replace(self, target)

        patch.setattr(Path, "replace", killed)
        tiny_autoencoder(seed=1).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="was stopped while it wrote this folder; write it again"):
        Autoencoder.from_pretrained(tmp_path)
    tiny_autoencoder(seed=1).save_pretrained(tmp_path)
    assert Autoencoder.from_pretrained(tmp_path).fingerprint == tiny_autoencoder(seed=1).fingerprint


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    child = "import os, sys; from tessera.weights.writing import replacing\nwith replacing(sys.argv[1]): os._exit(9)"
    subprocess.run([sys.executable, "-c", child, str(tmp_path)])
    assert [path.name.startswith(writing.PART) for path in tmp_path.iterdir()] == [True]
    living = tmp_path / writing._part_name()
    living.mkdir()
    tiny_autoencoder().save_pretrained(tmp_path)
    assert [path for path in tmp_path.iterdir() if path.name.startswith(writing.PART)] == [living]


def test_a_bundle_replaces_its_own_files_and_leaves_others(tiny_parts: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (bundle / "prior" / "notes.txt").write_text("precious")
    (bundle / "letter").write_text("precious")
    parts: dict[str, Any] = {part: tiny_parts / part for part in ("image_tokenizer", "prior", "text_tokenizer")}
    assemble_bundle(bundle, **parts)
    assert load_bundle(bundle).reranker is None and not (bundle / "reranker").exists()
    assert (bundle / "prior" / "notes.txt").read_text() == (bundle / "letter").read_text() == "precious"

    foreign = tmp_path / "diffusers"
    (foreign / "unet").mkdir(parents=True)
    (foreign / "unet" / "w.safetensors").write_text("precious")
    (foreign / INDEX).write_text(FOREIGN[INDEX])
    before = snapshot(foreign)
    with pytest.raises(InputError, match=f"{INDEX} is in the way"):
        assemble_bundle(foreign, **parts)
    assert snapshot(foreign) == before

    own = Path(shutil.copytree(tiny_bundle, tmp_path / "own"))
    (own / "prior" / "model.safetensors").write_bytes(b"somebody's own")
    (own / "prior" / "config.json").write_text(FOREIGN["config.json"])
    with pytest.raises(InputError, match="in the way"):
        assemble_bundle(own, **parts)
    assert (own / "prior" / "model.safetensors").read_bytes() == b"somebody's own"


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small file system, which needs root")
def test_a_full_disk_costs_the_file_and_leaves_no_part_of_it(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(WriteError, match="(the weights|model.safetensors) of .* not be written: the disk is full"):
            tiny_autoencoder().save_pretrained(disk / "model")
        with pytest.raises(WriteError, match=f"^tokenizer.json of {disk}/text could not be written: the disk is full"):
            TextTokenizer.train([chr(i) * 9 for i in range(0x4E00, 0x8000)], 16000).save_pretrained(disk / "text")
        with pytest.raises(WriteError, match="state.pt could not be written: the disk is full"):
            with new_file(disk / "state.pt") as part:
                torch.save({"weight": torch.zeros(100_000)}, part)
        with pytest.raises(WriteError, match="text could not be written"):
            write_text(disk / "text", "x" * 100_000)
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # torch keeps what it failed to write open


def test_a_folder_is_locked_until_its_process_ends(tmp_path: Path) -> None:
    child = "import sys; from pathlib import Path; from tessera.weights.lock import FolderLock\n"
    child += "lock = FolderLock(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", child, str(tmp_path)], stdin=-1, stdout=-1) as other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        with pytest.raises(InputError, match=f"in use by process {other.pid} on .* since .*; wait for it"):
            FolderLock(tmp_path)
        other.kill()
    FolderLock(tmp_path).release()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, dtype: torch.dtype) -> None:
    weight = torch.randn(7, 5).to(dtype)
    state = {"counts": torch.arange(3), "empty": torch.empty(0, dtype=dtype), "weight": weight}
    refuse_not_finite(state, "here")
    weight[6, 4] = value
    with pytest.raises(InputError, match="here: the weight 'weight' holds numbers that are not finite"):
        refuse_not_finite(state, "here")


def test_neither_read_nor_written_are_weights_that_are_not_finite(tmp_path: Path) -> None:
    model = tiny_autoencoder()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["encoder.conv_in.bias"][0] = torch.nan
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"encoder.conv_in.bias.*not finite"):
        load_weights(tiny_autoencoder(), tmp_path)
    with torch.no_grad():
        model.decoder.conv_out.weight.fill_(1e6)  # finite, but not in float16
    with pytest.raises(InputError, match=r"decoder.conv_out.weight.*not finite"):
        model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    assert not (tmp_path / "half").exists()


def test_the_data_folder_is_no_output_folder(tmp_path: Path) -> None:
    writing.refuse_data_folder(tmp_path / "runs", tmp_path, "output")
    (tmp_path / "link").symlink_to(tmp_path)
    for same in (tmp_path, tmp_path / "x" / "..", tmp_path / "link"):
        with pytest.raises(InputError, match="output: .* is the data folder"):
            writing.refuse_data_folder(same, tmp_path, "output")


def test_earlier_releases_are_known_by_their_content(tiny_bundle: Path, tmp_path: Path) -> None:
    for part in ("image_tokenizer", "prior", "text_tokenizer", "reranker"):
        folder = Path(shutil.copytree(tiny_bundle / part, tmp_path / part))
        weights = folder / "open_clip_model.safetensors"
        if weights.exists():
            save_file(load_file(weights), weights)  # without a mark
        refuse_foreign(folder)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"revision": "0123456789abcdef"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"whatever")
    refuse_foreign(tmp_path)


def test_a_script_fills_only_a_folder_of_its_own(tmp_path: Path) -> None:
    writing.own_folder(tmp_path / "new" / "digits", "digits")
    (tmp_path / "new" / "digits" / "0.png").touch()
    writing.own_folder(tmp_path / "new" / "digits", "digits")  # again over its own
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").touch()
    for folder, what in ((tmp_path / "photos", "digits"), (tmp_path / "new" / "digits", "emoji")):
        with pytest.raises(InputError, match=f"is not empty and was not made for {what}"):
            writing.own_folder(folder, what)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["me.jpg"]


@pytest.mark.parametrize(
    "error, full",
    [
        (OSError(28, "No space left on device"), True),
        (OSError(122, "Disk quota exceeded"), True),
        (OSError(5, "Input/output error"), False),
        (RuntimeError("No space left"), True),
        (RuntimeError("IoError(Os { ... }) (os error 28)"), True),
        (RuntimeError("Disk quota exceeded (os error 122)"), True),
        (RuntimeError("os error 2"), False),
        (InputError("os error 28 is what the user wrote"), False),
        (KeyboardInterrupt("os error 28"), False),
    ],
)
def test_every_library_s_word_for_a_full_disk_is_known(error, full, tmp_path):
    (tmp_path / "a.json").write_text("before")
    with pytest.raises(WriteError if full else type(error), match="the disk is full" if full else None):
        with new_file(tmp_path / "a.json") as part:
            part.write_text("half")
            raise error
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_text() == "before"


def test_what_a_header_says_beside_its_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(2)}, path, {"made": "here"})
    assert safetensors_metadata(path) == {"made": "here"}
    save_file({"w": torch.ones(2)}, path)
    assert safetensors_metadata(path) is None
    for header in (b"[1, 2]", b'"text"', b"{}"):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        assert safetensors_metadata(path) is None
    for content in (b"", bytes(8), (2**62).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no safetensors header"):
            safetensors_metadata(path)


def test_the_home_folder_is_meant_by_its_sign(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    save(Path("~/models/one"))
    assert list((tmp_path / "home" / "models" / "one").iterdir()) and not (tmp_path / "~").exists()
