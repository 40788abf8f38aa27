"""Codes belong to their pictures and captions: what changed is encoded again, what did not is kept, none are mixed."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import stage2_prior.encode
from stage1_tokenizer import Autoencoder
from stage2_prior.codes import Codes
from stage2_prior.encode import encode, staged_name
from tessera.errors import InputError, WriteError
from tests.conftest import tiny_autoencoder
from tests.processes import run_processes

PICTURES = 10


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Ten pictures with captions, a tokenizer, and a recipe that makes shards of four."""
    data = tmp_path / "data"
    data.mkdir()
    random = np.random.default_rng(0)
    for i in range(PICTURES):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(data / f"{i}.png")
    write_rows(data, range(PICTURES))
    tiny_autoencoder().save_pretrained(tmp_path / "tokenizer")
    recipe = {"data": {"folder": str(data)}, "image_tokenizer": str(tmp_path / "tokenizer"),
              "output": str(tmp_path / "codes"), "shard_rows": 4, "batch_size": 3}  # fmt: skip
    (tmp_path / "encode.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def write_rows(data: Path, order: object, **fields: object) -> None:
    rows = [{"file_name": f"{i}.png", "text": f"picture {i}"} | fields for i in order]  # type: ignore[attr-defined]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def pairs(world: Path) -> dict[str, list[int]]:
    """The codes that stand beside each caption."""
    codes = Codes(world / "codes")
    return {
        captions[0]: row.tolist() for captions, row in zip(codes.captions, codes.read(range(len(codes))), strict=True)
    }


def expected(world: Path, numbers: object = range(PICTURES)) -> dict[str, list[int]]:
    from tessera.data.source import ImageFolder

    data = ImageFolder(world / "data", 16)
    tokenizer = Autoencoder.from_pretrained(world / "tokenizer")
    found = {}
    for i, item in enumerate(data.items):
        if item.captions[0] in {f"picture {n}" for n in numbers}:  # type: ignore[attr-defined]
            found[item.captions[0]] = tokenizer.encode(data.read(i).unsqueeze(0)).flatten().tolist()
    return found


@pytest.fixture
def encoded(world: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Encodes once, and from then on collects how many pictures each batch had."""
    encode(world / "encode.yaml")
    counts: list[int] = []
    plain = Autoencoder.encode

    def counted(self: Autoencoder, images: torch.Tensor, tile: int | None = None) -> torch.Tensor:
        counts.append(len(images))
        return plain(self, images, tile)

    monkeypatch.setattr(Autoencoder, "encode", counted)
    return counts


def test_every_caption_stands_beside_its_picture_s_codes(world: Path, encoded: list[int]) -> None:
    assert pairs(world) == expected(world)


def test_nothing_is_done_twice(world: Path, encoded: list[int]) -> None:
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (world / "codes").iterdir()}
    encode(world / "encode.yaml")
    assert encoded == []
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (world / "codes").iterdir()} == before


def test_another_order_takes_the_codes_along(world: Path, encoded: list[int]) -> None:
    write_rows(world / "data", reversed(range(PICTURES)))
    encode(world / "encode.yaml")
    assert encoded == [] and pairs(world) == expected(world)
    lines = (world / "codes" / "captions.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["text"] == ["picture 9"]
    encode(world / "encode.yaml", [f"output={world}/fresh"])
    for path in (world / "fresh").iterdir():
        assert path.read_bytes() == (world / "codes" / path.name).read_bytes(), path.name


def test_a_replaced_picture_alone_is_encoded_again(world: Path, encoded: list[int]) -> None:
    status = (world / "data" / "5.png").stat()
    Image.new("RGB", (16, 16), "red").save(world / "data" / "5.png")
    os.utime(world / "data" / "5.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    encode(world / "encode.yaml")
    assert encoded == [1] and pairs(world) == expected(world)


def test_pictures_come_and_go(world: Path, encoded: list[int]) -> None:
    write_rows(world / "data", [9, 1, 3])
    encode(world / "encode.yaml")
    assert encoded == [] and pairs(world) == expected(world, [9, 1, 3])
    assert sorted(path.name for path in (world / "codes").iterdir()) == [
        "captions.jsonl",
        "codes-00000.safetensors",
        "meta.json",
    ]
    write_rows(world / "data", range(PICTURES))
    encoded.clear()
    encode(world / "encode.yaml")
    assert sum(encoded) == 7 and pairs(world) == expected(world)


def test_another_split_of_the_same_size_has_its_own_codes(world: Path, encoded: list[int]) -> None:
    rows = [{"file_name": f"{i}.png", "text": f"picture {i}", "split": "ab"[i % 2]} for i in range(PICTURES)]
    (world / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for split, numbers in (("a", range(0, 10, 2)), ("b", range(1, 10, 2))):
        encode(world / "encode.yaml", [f"data.split={split}"])
        assert pairs(world) == expected(world, numbers)


def test_files_of_others_among_the_shards_stay(world: Path, encoded: list[int]) -> None:
    others = {"codes-old.safetensors": b"precious", "codes-00009.safetensors": b"precious", "notes.txt": b"precious"}
    for name, content in others.items():
        (world / "codes" / name).write_bytes(content)
    write_rows(world / "data", [9, 1, 3])
    encode(world / "encode.yaml")
    assert pairs(world) == expected(world, [9, 1, 3]) and not (world / "codes" / "codes-00001.safetensors").exists()
    assert {name: (world / "codes" / name).read_bytes() for name in others} == others


def test_captions_alone_do_not_touch_the_codes(world: Path, encoded: list[int]) -> None:
    before = Codes(world / "codes").identity
    write_rows(world / "data", range(PICTURES), weight=2.0)
    encode(world / "encode.yaml")
    assert encoded == [] and Codes(world / "codes").weights == [2.0] * PICTURES
    assert Codes(world / "codes").identity != before


def test_broken_pictures_are_left_out_and_named(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "data" / "3.png").write_bytes(b"broken")
    (world / "data" / "4.png").unlink()
    encode(world / "encode.yaml")
    said = capsys.readouterr().err
    assert said.count("skipped: ") == 2 and "3.png is not a readable picture" in said and "4.png does not exist" in said
    assert pairs(world) == expected(world, [0, 1, 2, 5, 6, 7, 8, 9])
    Image.new("RGB", (16, 16), "red").save(world / "data" / "3.png")  # mended
    encode(world / "encode.yaml")
    assert pairs(world) == expected(world, [0, 1, 2, 3, 5, 6, 7, 8, 9])
    for i in range(4):
        (world / "data" / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(InputError, match="of 10 pictures could not be read, too many"):
        encode(world / "encode.yaml", [f"output={world}/other"])


def test_stopped_half_way_it_goes_on_and_never_mixes(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, done = stage2_prior.encode._write, list[object]()

    def killed(*arguments: object) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments)
        write(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage2_prior.encode, "_write", killed)
        encode(world / "encode.yaml")
    with pytest.raises(InputError, match="has no meta.json"):
        Codes(world / "codes")
    kept = (world / "codes" / staged_name(0)).stat().st_ino
    encode(world / "encode.yaml")
    assert pairs(world) == expected(world) and (world / "codes" / "codes-00000.safetensors").stat().st_ino == kept

    Image.new("RGB", (16, 16), "red").save(world / "data" / "9.png")
    before = pairs(world)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage2_prior.encode, "_settle", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        encode(world / "encode.yaml")
    assert pairs(world) == before  # the old pictures with the old captions
    encode(world / "encode.yaml")
    assert pairs(world) == expected(world)


def test_a_damaged_shard_is_made_anew(world: Path, encoded: list[int]) -> None:
    (world / "codes" / "codes-00001.safetensors").write_bytes(b"damaged")
    encode(world / "encode.yaml")
    assert sum(encoded) == 4 and pairs(world) == expected(world)


def test_codes_of_earlier_releases_are_read_and_made_anew(world: Path, encoded: list[int]) -> None:
    for path in (world / "codes").glob("*.safetensors"):
        save_file({"codes": load_file(path)["codes"]}, path)  # they held nothing else
    assert pairs(world) == expected(world)
    encoded.clear()
    encode(world / "encode.yaml")
    assert sum(encoded) == PICTURES and pairs(world) == expected(world)


def test_what_is_not_ours_is_in_the_way(world: Path) -> None:
    for name in ("captions.jsonl", "codes-00000.safetensors"):
        folder = world / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("precious")
        with pytest.raises(InputError, match=f"{name} is in the way"):
            encode(world / "encode.yaml", [f"output={folder}"])
        assert (folder / name).read_text() == "precious" and len(list(folder.iterdir())) == 1
    with pytest.raises(InputError, match="output: .* is the data folder"):
        encode(world / "encode.yaml", [f"output={world}/data"])


def test_a_full_disk_costs_the_shard_and_leaves_no_part(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stage2_prior.encode, "save_file", full)
    with pytest.raises(WriteError, match="next-00000.safetensors could not be written: the disk is full"):
        encode(world / "encode.yaml")
    assert not (world / "codes").exists()


def test_two_processes_share_the_work_and_write_the_same(world: Path, encoded: list[int]) -> None:
    (world / "data" / "6.png").write_bytes(b"broken")
    code = "import sys; from stage2_prior.encode import encode; encode(sys.argv[1], sys.argv[2:])"
    said = run_processes(code, world / "encode.yaml", f"output={world}/two")
    assert "".join(said).count("6.png is not a readable picture") == 1  # of the process whose shard it is in
    encode(world / "encode.yaml", [f"output={world}/one"])
    for path in (world / "one").iterdir():
        assert path.read_bytes() == (world / "two" / path.name).read_bytes(), path.name
    assert len(list((world / "two").iterdir())) == 5
