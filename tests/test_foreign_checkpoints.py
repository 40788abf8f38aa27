"""Checkpoints as other projects leave them: containers, prefixes, averages, settings beside them, and what is no
checkpoint at all. Each loads as its project would load it, or is refused in one sentence; none can ask for more memory
than a file of its size may."""

import gzip
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import textwrap
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipelines import cli
from stage1_tokenizer import Autoencoder
from stage1_tokenizer.convert import convert
from tessera.errors import InputError, InputWarning
from tessera.weights.choice import choosing, unwrapped
from tessera.weights.containers import unpacked
from tessera.weights.foreign import Weights, mentions, need, pick, read_tensors
from tessera.weights.pickles import MAGIC, VERSION, Inert, read_pickle
from tests.test_convert_tokenizers import random_vqgan, wrapped

State = dict[str, Tensor]


def same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def refusal(call: Callable[[], object]) -> str:
    """The one sentence with which something is refused, which never shows what torch or Python say."""
    with pytest.raises(InputError) as caught:
        call()
    sentence = str(caught.value)
    assert "weights_only" not in sentence and "site-packages" not in sentence and "\n" not in sentence
    return sentence


def codebook(folder: Path) -> Tensor:
    return Autoencoder.from_pretrained(folder).bottleneck.get_parameter("codebook").detach()


def recompressed(path: Path, kind: int = zipfile.ZIP_DEFLATED) -> Path:
    """The same zip file with its entries compressed, as a program that packs anew writes it."""
    packed = path.with_suffix(".packed")
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(packed, "w", kind) as changed:
        for entry in whole.namelist():
            changed.writestr(entry, whole.read(entry))
    return packed.rename(path)


# Zip files and what came before ---------------------------------------------------------------------------------------


def everything() -> State:
    """Tensors of many kinds."""
    torch.manual_seed(0)
    return {
        "plain": torch.randn(3, 4),
        "turned": torch.randn(3, 4).T,
        "half": torch.randn(5).half(),
        "bfloat16": torch.randn(5).bfloat16(),
        "wide": torch.randn(3).double(),
        "codes": torch.arange(7),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "one": torch.tensor(3.0),
        "none": torch.empty(0, 4),
        "part": torch.randn(10)[3:7],
        "expanded": torch.randn(1).expand(5),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_every_kind_of_tensor_is_read(zipped: bool, tmp_path: Path) -> None:
    tensors = everything()
    tensors["again"] = tensors["plain"]
    torch.save(tensors, tmp_path / "f.pt", _use_new_zipfile_serialization=zipped)
    same(read_tensors([tmp_path / "f.pt"]), tensors)


def test_compressed_entries_are_read_right(tmp_path: Path) -> None:
    weights = random_vqgan()
    path = recompressed(wrapped(weights | {"zeros": torch.zeros(1000)}, tmp_path / "last.ckpt"))
    assert zipfile.ZipFile(path).infolist()[0].compress_type == zipfile.ZIP_DEFLATED
    same(read_tensors([path]), weights | {"zeros": torch.zeros(1000)})
    assert torch.equal(
        codebook(convert("taming-vqgan", [recompressed(wrapped(weights, path))], tmp_path / "out")),
        weights["quantize.embedding.weight"],
    )
    assert "compressed in a way" in refusal(lambda: read_tensors([recompressed(path, zipfile.ZIP_LZMA)]))


def test_a_damaged_compressed_entry_is_refused(tmp_path: Path) -> None:
    path = recompressed(wrapped({"w": torch.randn(1000)}, tmp_path / "last.ckpt"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    assert "damaged or not a torch checkpoint" in refusal(lambda: read_tensors([path]))


def framework(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A training framework's module, to be taken away again before reading."""
    module = types.ModuleType("some_framework")
    exec("class Callback(dict):\n    pass\nclass Shard:\n    pass", module.__dict__)
    monkeypatch.setitem(sys.modules, "some_framework", module)
    return module


@pytest.mark.parametrize("zipped", [True, False])
def test_foreign_classes_are_not_needed_and_are_named(
    zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = framework(monkeypatch)
    weights = {"w": torch.arange(3.0), "v": torch.randn(2, 5)}
    options = {"_use_new_zipfile_serialization": zipped}
    torch.save({"state_dict": weights, "callbacks": module.Callback(a=1)}, tmp_path / "f.ckpt", **options)
    torch.save({"state_dict": {"w": module.Shard()}}, tmp_path / "g.ckpt", **options)
    monkeypatch.delitem(sys.modules, "some_framework")
    same(read_tensors([tmp_path / "f.ckpt"]), weights)
    assert isinstance(read_pickle(tmp_path / "f.ckpt")["callbacks"], Inert)
    assert "objects of some_framework.Shard" in refusal(lambda: read_tensors([tmp_path / "g.ckpt"]))


def test_an_objects_attributes_are_read_with_and_without_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With slots an object's state is a pair: a dictionary of what is in no slot, and one of the slots."""
    module = framework(monkeypatch)
    exec("class Plain:\n    pass\nclass Slotted(Plain):\n    __slots__ = ('b',)", module.__dict__)
    objects = {"plain": module.Plain(), "slotted": module.Slotted()}
    for one in objects.values():
        one.a = 1
    objects["slotted"].b = 2
    torch.save(objects, tmp_path / "f.pt")
    monkeypatch.delitem(sys.modules, "some_framework")
    found = read_pickle(tmp_path / "f.pt")
    assert found["plain"].state == {"a": 1} == found["slotted"].state


def test_weights_are_counted_up_to_the_first_that_lacks() -> None:
    for numbers, count in (([], 0), ([0], 1), ([0, 1, 2], 3), ([0, 1, 3], 2), ([1, 2], 0)):
        weights = Weights({f"blocks.{i}.w": torch.zeros(1) for i in numbers}, "f.pt")
        assert weights.count("blocks.{}.w") == count


def test_the_first_file_of_the_first_pattern_is_picked(tmp_path: Path) -> None:
    for name in ("a.txt", "inner/b.json", "c.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert need([tmp_path], "get it", "inner/*.json", "*.txt") == tmp_path / "inner" / "b.json"
    assert need([tmp_path / "a.txt", tmp_path], "get it", "*.yaml", "*.txt") == tmp_path / "a.txt"
    assert pick([tmp_path], "*.yaml") is None
    with pytest.raises(InputError, match="there is no model.pt in .*; get it"):
        need([tmp_path], "get it", "ckpt/model.pt")


def test_a_tensor_is_split_along_its_rows() -> None:
    tensor = torch.arange(12.0).view(6, 2)
    weights = Weights({"qkv": tensor.clone()}, "f.pt")
    with pytest.raises(InputError, match="f.pt: 'qkv' has 6 rows, but 2 were expected"):
        weights.split("qkv", [1, 1], ["q", "k"])
    weights.split("qkv", [1, 2, 3], ["q", "k", "v"])
    assert weights.tensors.keys() == {"q", "k", "v"}
    assert all(
        torch.equal(weights.tensors[name], tensor[a:b]) for name, a, b in (("q", 0, 1), ("k", 1, 3), ("v", 3, 6))
    )


def test_a_legacy_file_that_is_cut_off_or_of_other_sizes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    torch.save({"a": torch.arange(100.0), "b": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for damaged in (content[:-1], content[:-500], content[:200], content[:5]):
        path.write_bytes(damaged)
        assert "damaged or not a torch checkpoint" in refusal(lambda: read_tensors([path]))


def test_a_checkpoint_inside_itself_is_read_once(tmp_path: Path) -> None:
    content: dict[str, Any] = {"w": torch.ones(2)}
    content["model"] = content["ema"] = content["hyper_parameters"] = content
    torch.save(content, tmp_path / "f.pt")
    with choosing("model"):
        same(read_tensors([tmp_path / "f.pt"]), {"w": torch.ones(2)})
    assert not mentions(tmp_path / "f.pt", re.compile("IBQ"))
    module: dict[str, Any] = {"model": types.SimpleNamespace(_modules={})}
    module["model"]._modules |= {str(i): module["model"] for i in range(9)}
    torch.save(module, tmp_path / "g.pt")
    assert "holds itself" in refusal(lambda: read_tensors([tmp_path / "g.pt"]))


# What a file may ask for ----------------------------------------------------------------------------------------------


class Stored:
    """A storage in a pickle: dtype's class, key, number of elements."""

    def __init__(
        self, numel: int, key: str = "0", kind: Any = torch.FloatStorage, part: tuple[str, int, int] | None = None
    ) -> None:
        """`part` is a view of it before torch 1.6: name, first element, number of elements."""
        self.pid, self.part = ("storage", kind, key, "cpu", numel), part


class Made:
    """A tensor in a pickle, of any size and stride."""

    def __init__(self, storage: Stored, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.arguments: tuple[Any, ...] = (storage, 0, size, stride, False, OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


class Writer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, legacy: bool) -> None:
        super().__init__(file, 2)
        self.legacy = legacy

    def persistent_id(self, value: object) -> object:
        return (value.pid + (value.part,) * self.legacy) if isinstance(value, Stored) else None


def pickled(content: object, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    Writer(file, legacy).dump(content)
    return file.getvalue()


def legacy_file(path: Path, content: bytes, storages: dict[str, bytes] | None = None) -> Path:
    """A checkpoint as before torch 1.6, with the numbers of elements as the bytes have them (4 each)."""
    head = b"".join(pickle.dumps(part, 2) for part in (MAGIC, VERSION, {"little_endian": True}))
    stored = storages or {}
    tail = b"".join(struct.pack("<q", len(data) // 4) + data for data in stored.values())
    path.write_bytes(head + content + pickle.dumps(list(stored), 2) + tail)
    return path


def zip_file(path: Path, content: bytes, storages: dict[str, bytes] | None = None, kind: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", kind) as file:
        file.writestr("archive/data.pkl", content)
        for key, data in (storages or {}).items():
            file.writestr(f"archive/data/{key}", data)
    return path


@pytest.mark.parametrize(
    "first, count, fits",
    [(0, 4, True), (1, 3, True), (2, 1, True), (4, 0, True), (-1, 2, False), (1, 4, False), (3, -1, False)],
)
def test_parts_of_a_storage_before_torch_1_6(first: int, count: int, fits: bool, tmp_path: Path) -> None:
    numbers = struct.pack("<4f", 10, 11, 12, 13)
    content = pickled({"w": Made(Stored(4, part=("view", first, count)), (max(count, 0),), (1,))}, legacy=True)
    path = legacy_file(tmp_path / "old.pt", content, {"0": numbers})
    if fits:
        assert read_tensors([path])["w"].tolist() == [10.0 + i for i in range(first, first + count)]
    else:
        assert "a part of storage 0 lies outside of it" in refusal(lambda: read_tensors([path]))


MEGABYTE = bytes(2**20)
NESTED = b"\x80\x02}" + b")" + b"2\x86" * 90 + b"K\x01s."  # the key is ((..., ...), (..., ...)), 90 deep
BOMBS: dict[str, Callable[[Path], Path]] = {
    "a storage of 32 GiB before torch 1.6": lambda path: legacy_file(
        path, pickled({"w": Made(Stored(2**33), (2**33,), (1,))}, legacy=True), {"0": b""}
    ),
    "a memo of 2^32 entries": lambda path: legacy_file(path, b"\x80\x02}r\xff\xff\xff\x7f."),
    "a memo of 2^32 entries, zipped": lambda path: zip_file(path, b"\x80\x02}r\xff\xff\xff\x7f."),
    "an array of 16 GiB": lambda path: zip_file(path, b"\x80\x05\x96" + struct.pack("<Q", 2**34) + b"."),
    "a text of 4 GiB": lambda path: zip_file(path, b"\x80\x05\x8d" + struct.pack("<Q", 2**32) + b"."),
    "a frame of 4 GiB": lambda path: zip_file(path, b"\x80\x05\x95" + struct.pack("<Q", 2**32) + b"}."),
    "one number as a matrix": lambda path: zip_file(
        path, pickled({"w": Made(Stored(1), (2**20, 2**14), (0, 0))}), {"0": bytes(4)}
    ),
    "one storage under many names": lambda path: zip_file(
        path, pickled({f"w{i}": Made(Stored(2**18), (2**18,), (1,)) for i in range(1500)}), {"0": MEGABYTE}
    ),
    "zeros, compressed": lambda path: zip_file(
        path, pickled({"w": Made(Stored(2**26), (2**26,), (1,))}), {"0": MEGABYTE * 256}, zipfile.ZIP_DEFLATED
    ),
    "a pickle, compressed": lambda path: zip_file(path, b"\x80\x02]" + b"}" * 2**26 + b".", None, zipfile.ZIP_DEFLATED),
    "a tensor set to another size": lambda path: zip_file(
        path,
        b"\x80\x02"
        + pickled(Made(Stored(1), (1,), (1,)))[2:-1]
        + b"("
        + pickled((Stored(1), 0, (2**32,), (1,)))[2:-1]
        + b"tb.",
        {"0": bytes(4)},
    ),
    "a key that takes for ever": lambda path: zip_file(path, NESTED),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_cannot_ask_for_gigabytes(name: str, tmp_path: Path) -> None:
    path = BOMBS[name](tmp_path / "f.ckpt")
    script = textwrap.dedent(f"""
        import resource, sys
        from pathlib import Path
        from tessera.weights.foreign import read_tensors
        from tessera.errors import InputError
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            read_tensors([Path({str(path)!r})])
        except InputError as error:
            print(error)
        else:
            sys.exit("it was read")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if grown > 400_000:
            sys.exit(f"{{grown}} KiB were taken")
    """)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(path)) or "f.ckpt has" in result.stdout
    assert "weights_only" not in result.stdout


@pytest.mark.parametrize("compressed", [True, False])
def test_an_archive_cannot_fill_the_disk(compressed: bool, tmp_path: Path) -> None:
    path = tmp_path / ("1.3B.tar.gz" if compressed else "1.3B.tar")
    if compressed:
        with gzip.open(path, "wb", 1) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
            member = tarfile.TarInfo("zeros")
            member.size = 2**27
            archive.addfile(member, io.BytesIO(bytes(2**27)))
    else:  # a file with holes, as GNU's tar writes it: one header, no content
        hole = tarfile.TarInfo("holes")
        header = bytearray(hole.tobuf(tarfile.GNU_FORMAT))
        header[156:157] = b"S"
        header[386:398], header[398:410] = b"00000000000\0", b"00000000000\0"
        header[483:495] = b"77777777777\0"  # what the file is long, 8 GiB
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        path.write_bytes(bytes(header) + bytes(1024))

    def unpack() -> None:
        with unpacked([path]):
            pass

    assert "would unpack to more than" in refusal(unpack)
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_in_an_archive_cannot_be_longer_than_the_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    with gzip.open(path, "wb", 1) as packed:
        header = tarfile.TarInfo("././@LongLink")
        header.size, header.type = 2**26, tarfile.GNUTYPE_LONGNAME
        packed.write(header.tobuf(tarfile.GNU_FORMAT) + b"a" * 2**26)

    def unpack() -> None:
        with unpacked([path]):
            pass

    assert "would unpack to more than" in refusal(unpack)


@pytest.mark.parametrize("resolution", [10**12, 0, -3])
def test_sizes_in_settings_are_bounded(resolution: int, tmp_path: Path) -> None:
    wrapped(random_vqgan(), tmp_path / "last.ckpt")
    settings = {"model": {"params": {"ddconfig": {"resolution": resolution}}}}
    (tmp_path / "model.yaml").write_text(json.dumps(settings))
    sentence = refusal(lambda: convert("taming-vqgan", [tmp_path], tmp_path / "out"))
    assert f"pictures of {resolution} pixels" in sentence


# Prefixes and averages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "model._orig_mod.", "module._orig_mod.module.", "_fsdp_wrapped_module."],
)
@pytest.mark.parametrize("kind", ["pickle", "safetensors"])
def test_prefixes_of_wrappers_are_taken_off(prefix: str, kind: str, tmp_path: Path) -> None:
    weights = random_vqgan()
    stored = {prefix + name: tensor for name, tensor in weights.items()}
    if kind == "pickle":
        path = wrapped(stored | {"loss.logvar": torch.zeros(())}, tmp_path / "last.ckpt")
    else:
        save_file(stored, path := tmp_path / "last.safetensors")
    convert("taming-vqgan", [path], tmp_path / "out")
    assert torch.equal(codebook(tmp_path / "out"), weights["quantize.embedding.weight"])


def test_a_wrapper_inside_a_model_is_taken_out_of_names() -> None:
    tensors = {"encoder._orig_mod.conv.weight": torch.ones(1), "head.weight": torch.zeros(1)}
    assert list(unwrapped(tensors)) == ["encoder.conv.weight", "head.weight"]
    both = {"_orig_mod.w": torch.ones(1), "w": torch.zeros(1)}
    assert unwrapped(both) == both  # two names would become one


def test_a_prefix_that_no_wrapper_writes_is_named(tmp_path: Path) -> None:
    path = wrapped({f"net.vq.{name}": tensor for name, tensor in random_vqgan().items()}, tmp_path / "last.ckpt")
    assert "inside 'net.vq.'" in refusal(lambda: convert("taming-vqgan", [path], tmp_path / "out"))


def averages(weights: State) -> dict[str, dict[str, Any]]:
    """Checkpoints with `weights` and, as their average, the same doubled, as projects write them."""
    doubled = {name: 2 * tensor for name, tensor in weights.items()}
    dotless = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in doubled.items()}
    parts = {}
    for name, tensor in doubled.items():
        part, _, inside = name.partition(".")
        parts[f"ema_{part}.{inside.replace('.', '')}"] = tensor
    counters = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    wrapped_names = {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}
    wrapped_average = {f"model_ema._orig_mod{name.replace('.', '')}": tensor for name, tensor in doubled.items()}
    return {
        "LlamaGen": {"model": weights, "ema": doubled, "optimizer": {}},
        "an entry": {"state_dict": weights, "ema_state_dict": {f"module.{n}": t for n, t in doubled.items()}},
        "timm": {"state_dict": weights, "state_dict_ema": doubled},
        "LitEma": {"state_dict": weights | dotless | counters},
        "LitEma, compiled": {"state_dict": wrapped_names | wrapped_average},
        "LitEma of parts": {"state_dict": weights | parts | {"ema_encoder.decay": torch.tensor(0.9)}},
        "LitEma of a model": {
            "state_dict": {f"model.{name}": tensor for name, tensor in weights.items()} | dotless | counters
        },
        "whole names": {"state_dict": weights | {f"ema_model.{name}": tensor for name, tensor in doubled.items()}},
    }


@pytest.mark.parametrize("name", averages({}))
def test_the_average_is_taken_said_and_can_be_left(name: str, tmp_path: Path) -> None:
    weights = {"encoder.conv.weight": torch.randn(3), "quant_conv.bias": torch.randn(2)}
    torch.save(averages(weights)[name], path := tmp_path / "last.ckpt")
    doubled = {key: 2 * tensor for key, tensor in weights.items()}
    with pytest.warns(InputWarning, match="last.ckpt has weights and their moving average .* is taken"):
        same(read_tensors([path]), doubled)
    with warnings.catch_warnings(), choosing("ema") as choice:
        warnings.simplefilter("error")
        same(read_tensors([path]), doubled)
    assert choice.taken == {"last.ckpt": "ema"}
    with choosing("model") as choice:
        same(read_tensors([path]), weights)
    assert choice.taken == {"last.ckpt": "model"}


def test_an_average_that_is_not_whole_is_not_mixed_in(tmp_path: Path) -> None:
    weights = {"a.weight": torch.randn(3), "b.weight": torch.randn(2)}
    torch.save({"model": weights, "ema": {"a.weight": torch.ones(3)}}, path := tmp_path / "f.pt")
    with pytest.warns(InputWarning, match="lacks 1 of them, so they are taken as trained"):
        same(read_tensors([path]), weights)

    def read() -> None:
        with choosing("ema"):
            read_tensors([path])

    assert "lacks 1 weights, b.weight among them" in refusal(read)


def test_an_average_alone_and_none_at_all(tmp_path: Path) -> None:
    weights = {"a.weight": torch.randn(3)}
    torch.save({"ema": weights, "steps": 3}, path := tmp_path / "f.pt")
    same(read_tensors([path]), weights)
    with choosing("model"):
        assert "and not the weights it is of" in refusal(lambda: read_tensors([path]))
    torch.save({"model": weights}, path)

    def read() -> None:
        with choosing("ema"):
            read_tensors([path])

    assert "leave --weights ema out" in refusal(read)


@pytest.mark.filterwarnings("always")
def test_the_command_sets_and_records_the_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = random_vqgan()
    torch.save(averages(weights)["LitEma"], path := tmp_path / "last.ckpt")
    run = ["convert", "taming-vqgan", str(path), "--out", str(tmp_path / "out")]
    assert cli.main(run) == 0 and "--weights model takes them as trained" in capsys.readouterr().err
    assert torch.equal(codebook(tmp_path / "out"), 2 * weights["quantize.embedding.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["origin"]["weights"] == "ema"
    assert cli.main([*run, "--weights", "model"]) == 0 and not capsys.readouterr().err
    assert torch.equal(codebook(tmp_path / "out"), weights["quantize.embedding.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["origin"]["weights"] == "model"
    assert cli.main([*run, "--weights", "best"]) == 2
    assert "weights must be model or ema, got 'best'" in capsys.readouterr().err


def test_a_codebook_of_moving_averages_is_read(tmp_path: Path) -> None:
    counted = {"quantize.embedding.cluster_size": torch.ones(40), "quantize.embedding.embed_avg": torch.ones(40, 6)}
    convert("taming-vqgan", [wrapped(random_vqgan() | counted, tmp_path / "last.ckpt")], tmp_path / "out")


# Containers -----------------------------------------------------------------------------------------------------------


def halves(weights: State) -> tuple[State, State]:
    names = list(weights)
    return {name: weights[name] for name in names[::2]}, {name: weights[name] for name in names[1::2]}


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("given", ["folder", "one shard", "index"])
def test_shards_are_read_together(kind: str, given: str, tmp_path: Path) -> None:
    weights, folder = random_vqgan(), tmp_path / "sharded"
    folder.mkdir()
    names = [f"pytorch_model-{i:05}-of-00002.{kind}" for i in (1, 2)]
    for name, half in zip(names, halves(weights), strict=True):
        save_file(half, folder / name) if kind == "safetensors" else torch.save(half, folder / name)
    index = folder / f"pytorch_model.{kind}.index.json"
    places = {key: name for name, half in zip(names, halves(weights), strict=True) for key in half}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    source = {"folder": folder, "one shard": folder / names[1], "index": index}[given]
    convert("taming-vqgan", [source], tmp_path / "out")
    assert torch.equal(codebook(tmp_path / "out"), weights["quantize.embedding.weight"])
    (folder / names[0]).unlink()
    assert f"{names[0]} is not beside it" in refusal(lambda: convert("taming-vqgan", [source], tmp_path / "other"))


def test_an_index_names_files_beside_it_only(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").touch()
    (tmp_path / "f").mkdir()
    index = tmp_path / "f" / "model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.bin"}}))
    assert "is no file beside it" in refusal(lambda: read_tensors([index]))


def test_folders_of_deepspeed(tmp_path: Path) -> None:
    weights, inside = random_vqgan(), tmp_path / "run" / "last.ckpt" / "checkpoint"
    inside.mkdir(parents=True)
    torch.save({"module": {f"module.{n}": t for n, t in weights.items()}}, inside / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, inside / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    for source in (tmp_path / "run", tmp_path / "run" / "last.ckpt", inside, inside / "mp_rank_00_model_states.pt"):
        convert("taming-vqgan", [source], tmp_path / "out")
        assert torch.equal(codebook(tmp_path / "out"), weights["quantize.embedding.weight"])
    (inside / "mp_rank_00_model_states.pt").rename(inside / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    assert "zero_to_fp32.py" in refusal(lambda: convert("taming-vqgan", [tmp_path / "run"], tmp_path / "o"))
    (inside / "zero_pp_rank_0_mp_rank_00_model_states.pt").rename(inside / "mp_rank_00_model_states.pt")
    torch.save({"module": weights}, inside / "mp_rank_01_model_states.pt")
    assert "holds 2 files of weights" in refusal(lambda: convert("taming-vqgan", [tmp_path / "run"], tmp_path / "o"))


def test_a_distributed_checkpoint_says_how_to_join_it(tmp_path: Path) -> None:
    (tmp_path / "step-3.ckpt").mkdir()
    for name in (".metadata", "__0_0.distcp"):
        (tmp_path / "step-3.ckpt" / name).write_bytes(b"x")
    assert "dcp_to_torch" in refusal(lambda: convert("taming-vqgan", [tmp_path], tmp_path / "o"))


def test_what_stands_in_for_a_checkpoint_is_called_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"

    def said(content: bytes) -> str:
        path.write_bytes(content)
        return refusal(lambda: convert("taming-vqgan", [path], tmp_path / "o"))

    assert "Git LFS pointer" in said(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is a web page" in said(b"\n<!DOCTYPE html><html>log in</html>")
    assert "an error message of a server" in said(b'{"error":"Repository not found"}')
    assert "is empty" in said(b"")
    assert "is packed (gzip); unpack it" in said(gzip.compress(b"abc"))
    assert "is packed (7-Zip)" in said(b"7z\xbc\xaf\x27\x1c")
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.ckpt"))
    assert "is an archive; unpack it" in said(file.getvalue())
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("sys_info"))
    assert "written by torch 0.1" in said(file.getvalue())
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("model.ckpt", b"x")
    assert "is a zip archive and not a torch checkpoint; unpack it" in said(file.getvalue())
    assert "damaged or not a torch checkpoint" in said(file.getvalue()[:-30])
    assert "damaged or not a torch checkpoint" in said(pickle.dumps({"w": [1.0]}))
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    assert "is a TorchScript program; save its weights" in refusal(
        lambda: convert("taming-vqgan", [path], tmp_path / "o")
    )


def test_settings_and_vocabularies_can_be_pointers_too(tmp_path: Path) -> None:
    wrapped(random_vqgan(), tmp_path / "last.ckpt")
    (tmp_path / "model.yaml").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "model.yaml is a Git LFS pointer" in refusal(lambda: convert("taming-vqgan", [tmp_path], tmp_path / "o"))


def test_content_counts_and_not_the_ending(tmp_path: Path) -> None:
    weights = {"w": torch.randn(3)}
    save_file(weights, tmp_path / "f.ckpt")
    torch.save(weights, tmp_path / "g.safetensors")
    same(read_tensors([tmp_path / "f.ckpt"]), weights)
    same(read_tensors([tmp_path / "g.safetensors"]), weights)


def test_sharded_diffusers_weights(tmp_path: Path) -> None:
    from tests.test_convert_tokenizers import to_diffusers

    weights = {name: t.contiguous() for name, t in to_diffusers(random_vqgan(), 2).items()}
    (tmp_path / "vqvae").mkdir()
    (tmp_path / "vqvae" / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    names = [f"diffusion_pytorch_model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    for name, half in zip(names, halves(weights), strict=True):
        save_file(half, tmp_path / "vqvae" / name)
    places = {key: name for name, half in zip(names, halves(weights), strict=True) for key in half}
    index = tmp_path / "vqvae" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    save_file({"w": torch.ones(1)}, tmp_path / "vqvae" / "other.safetensors")  # is not looked at
    for sources in ([tmp_path], [tmp_path / "vqvae"], [tmp_path / "vqvae" / "config.json", index]):
        convert("diffusers-vq", sources, tmp_path / "out")
        assert torch.equal(codebook(tmp_path / "out"), weights["quantize.embedding.weight"])


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e39])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    weights = random_vqgan()
    spoiled = weights["encoder.mid.block_1.conv1.weight"].double()
    spoiled[3, 2, 1, 0] = value
    path = wrapped(weights | {"encoder.mid.block_1.conv1.weight": spoiled}, tmp_path / "last.ckpt")
    sentence = refusal(lambda: convert("taming-vqgan", [path], tmp_path / "out"))
    assert "last.ckpt: the weight 'encoder.mid.block_1.conv1.weight' is not finite" in sentence
    assert not (tmp_path / "out").exists()


def test_what_is_not_a_real_number_is_refused() -> None:
    weights = Weights({"w": torch.ones(2, dtype=torch.complex64)}, "f.pt")
    assert "complex numbers" in refusal(lambda: weights.assemble({"ours": ("w",)}, {"ours": (2,)}))


# Settings beside a checkpoint -----------------------------------------------------------------------------------------


def project(resolution: int) -> str:
    return json.dumps(
        {"model": {"target": "taming.models.vqgan.VQModel", "params": {"ddconfig": {"resolution": resolution}}}}
    )


def test_the_projects_settings_are_taken_and_not_the_trainers(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "checkpoints").mkdir()
    wrapped(random_vqgan(), tmp_path / "checkpoints" / "last.ckpt")
    date = "2021-04-03T19-39-50"
    (tmp_path / "configs" / f"{date}-lightning.yaml").write_text("lightning: {trainer: {gpus: '0,'}}")
    (tmp_path / "configs" / f"{date}-project.yaml").write_text(project(96))
    (tmp_path / "hparams.yaml").write_text("a: !!python/tuple [1, 2]")  # cannot be read, and need not
    convert("taming-vqgan", [tmp_path], tmp_path / "out")
    assert Autoencoder.from_pretrained(tmp_path / "out").image_size == 96
    (tmp_path / "configs" / "later-project.yaml").write_text(project(96))  # as a training that is resumed writes it
    convert("taming-vqgan", [tmp_path], tmp_path / "out2")
    (tmp_path / "configs" / "later-project.yaml").write_text(project(64))
    sentence = refusal(lambda: convert("taming-vqgan", [tmp_path], tmp_path / "out3"))
    assert f"{date}-project.yaml" in sentence and "later-project.yaml" in sentence and "different models" in sentence


def test_settings_in_other_layouts(tmp_path: Path) -> None:
    for number, content in enumerate(
        (
            {"model": {"class_path": "a.VQModel", "init_args": {"n_embed": 40, "ddconfig": {"resolution": 72}}}},
            {"embed_dim": 6, "n_embed": 40, "ddconfig": {"resolution": 72}},
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        wrapped(random_vqgan(), folder / "model.ckpt")
        (folder / "config.yaml").write_text(json.dumps(content))
        convert("taming-vqgan", [folder], tmp_path / "out")
        assert Autoencoder.from_pretrained(tmp_path / "out").image_size == 72


def test_the_umask_and_the_sources_are_left_alone(tmp_path: Path) -> None:
    """Reading maps files privately: nothing that is done to tensors reaches the disk."""
    path = wrapped({"w": torch.zeros(4)}, tmp_path / "last.ckpt")
    before = path.read_bytes()
    read_tensors([path])["w"].fill_(1)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["last.ckpt"]
