"""Damaged files of every kind at the command line: done, or one sentence and exit code 2; never what a library says.

Hypothesis draws the damage; `TESSERA_EXAMPLES=2000 pytest tests/test_damaged_input.py` tries more, other each time.
"""

import json
import math
import os
import shutil
import warnings
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from pipelines import cli
from pipelines.bundle import load_bundle
from stage2_prior.lora import base_fingerprint

EXAMPLES = int(os.environ.get("TESSERA_EXAMPLES", "0"))
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    10**6,
    10**20,
    1e308,
    math.nan,
    math.inf,
    "",
    "x",
    "~",
    "/",
    "\u2028",
    [],
    {},
    [[]],
    [None],
]

# kind -> the file that is damaged, and the command that reads it
CASES: dict[str, tuple[str, list[str]]] = {
    "index of a bundle": ("bundle/model_index.json", ["generate", "a dog", "--candidates", "1", "-n", "1"]),
    "described bundle": ("bundle/prior/model.safetensors", ["info", "bundle"]),
    "described tokenizer": ("bundle/text_tokenizer/tokenizer.json", ["info", "bundle/text_tokenizer"]),
    "config of a tokenizer": (
        "bundle/image_tokenizer/config.json",
        ["reconstruct", "picture.png", "--model", "bundle/image_tokenizer"],
    ),
    "weights of a tokenizer": (
        "bundle/image_tokenizer/model.safetensors",
        ["reconstruct", "picture.png", "--model", "bundle/image_tokenizer"],
    ),
    "config of a prior": ("bundle/prior/config.json", ["merge", "bundle/prior", "--lora", "lora"]),
    "weights of a prior": ("bundle/prior/model.safetensors", ["merge", "bundle/prior", "--lora", "lora"]),
    "text tokenizer": ("bundle/text_tokenizer/tokenizer.json", ["merge", "bundle/prior", "--lora", "lora"]),
    "config of a LoRA": ("lora/adapter_config.json", ["merge", "bundle/prior", "--lora", "lora"]),
    "weights of a LoRA": ("lora/adapter_model.safetensors", ["merge", "bundle/prior", "--lora", "lora"]),
    "config of a reranker": ("bundle/reranker/open_clip_config.json", ["rerank", "a dog", "picture.png"]),
    "weights of a reranker": ("bundle/reranker/open_clip_model.safetensors", ["rerank", "a dog", "picture.png"]),
    "tokenizer of a reranker": ("bundle/reranker/tokenizer.json", ["rerank", "a dog", "picture.png"]),
    "recipe": ("recipe.yaml", ["train", "text-tokenizer", "recipe.yaml", "output=trained"]),
    "prompts": ("prompts.jsonl", ["generate", "--prompts", "prompts.jsonl", "--candidates", "1", "-n", "1"]),
    "origin of a picture": ("drawn.png", ["generate", "--replay", "drawn.png"]),
    "zip of pickles": ("zipped.ckpt", ["convert", "taming-vqgan", "zipped.ckpt", "config.yaml"]),
    "pickle": ("old.ckpt", ["convert", "taming-vqgan", "old.ckpt", "config.yaml"]),
    **{f"picture.{kind}": (f"picture.{kind}", ["rerank", "a dog", f"picture.{kind}"]) for kind in
       ("png", "jpg", "gif", "tif", "webp", "bmp", "ppm")},
}  # fmt: skip
OPTIONS = {
    "generate": ["--model", "bundle", "--device", "cpu", "--out", "made"],
    "reconstruct": ["--out", "made"],
    "merge": ["--out", "made"],
    "convert": ["--out", "made"],
    "rerank": ["--model", "bundle/reranker"],
}


@pytest.fixture(scope="module")
def world(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole file of every kind."""
    root = tmp_path_factory.mktemp("world")
    shutil.copytree(tiny_bundle, root / "bundle")
    picture = Image.effect_noise((16, 16), 60).convert("RGB")
    for kind in ("png", "jpg", "gif", "tif", "webp", "bmp", "ppm"):
        picture.save(root / f"picture.{kind}")
    (root / "data").mkdir()
    picture.save(root / "data" / "a.png")
    (root / "data" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a dog"}\n', encoding="utf-8")
    recipe = {"data": {"folder": "data"}, "vocab_size": 280, "output": "trained"}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (root / "prompts.jsonl").write_text('{"prompt": "a dog"}\n"红心"\n', encoding="utf-8")
    prior = load_bundle(tiny_bundle, rerank=False).prior
    write_lora(root / "lora", prior)
    assert cli.main(["generate", "a dog", "--candidates", "1", "-n", "1", "--model", str(root / "bundle"),
                     "--device", "cpu", "--out", str(root / "out")]) == 0  # fmt: skip
    shutil.copyfile(next((root / "out").glob("*seed0.png")), root / "drawn.png")
    shutil.rmtree(root / "out")
    state = {"state_dict": {"encoder.conv_in.weight": torch.randn(8, 3, 3, 3)}, "epoch": 3}
    torch.save(state, root / "zipped.ckpt")
    torch.save(state, root / "old.ckpt", _use_new_zipfile_serialization=False)
    (root / "config.yaml").write_text("model: {params: {n_embed: 16, embed_dim: 8}}\n", encoding="utf-8")
    return root


def write_lora(folder: Path, prior: Any, value: float = 0.01) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "revision": base_fingerprint(prior)}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    name = next(name for name, _ in prior.named_parameters() if name.endswith("attention.out.weight"))
    layer = f"base_model.model.{name.removesuffix('.weight')}"
    out, inside = prior.get_parameter(name).shape
    halves = {"A": torch.full((2, inside), value), "B": torch.full((out, 2), value)}
    save_file(
        {f"{layer}.lora_{half}.weight": half_ for half, half_ in halves.items()}, folder / "adapter_model.safetensors"
    )
    return folder


# Damage ---------------------------------------------------------------------------------------------------------------


def damaged(data: bytes, name: str, chance: Random) -> bytes:
    """The content of a file, differently broken: by bits, by length, or in what it means."""
    if name.endswith((".json", ".yaml", ".jsonl")) and chance.random() < 0.6:
        return odd_meaning(data, name, chance)
    place = chance.randrange(len(data))
    header = chance.random() < 0.5
    place = place % 200 if header else place  # what says how to read the rest comes first
    end = min(len(data), place + chance.choice([1, 4, 50, len(data)]))
    match chance.randrange(8):
        case 0:
            return data[:place]
        case 1:
            return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
        case 2:
            return data[:place] + bytes(end - place) + data[end:]
        case 3:
            return data[:place] + chance.randbytes(chance.choice([1, 4, 100])) + data[place:]
        case 4:
            return data[:place] + data[end:]
        case 5:
            opening = chance.choice([b"[", b'{"a":', b"- ", b"(", b"\x80\x02]"])
            return data[:place] + opening * chance.choice([1, 20_000]) + data[place:]
        case 6:
            flipped = bytearray(data)
            for _ in range(20):
                flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            return bytes(flipped)
        case _:
            return data + data[place:end]


def odd_meaning(data: bytes, name: str, chance: Random) -> bytes:
    """A value somewhere in it is of another kind, or impossibly large, or its key is another."""
    whole = yaml.safe_load(data.splitlines()[0] if name.endswith(".jsonl") else data)  # JSON is YAML
    holders = [whole]
    for holder in holders:
        inner = list(holder.values()) if isinstance(holder, dict) else holder
        holders += [one for one in inner if isinstance(one, dict | list) and one and len(holders) < 500]
    holder = chance.choice(holders)
    if isinstance(holder, dict):
        key = chance.choice(list(holder))
        if chance.random() < 0.2:
            holder[chance.choice(["x", "", key + "s"])] = holder.pop(key)
        else:
            holder[key] = chance.choice(ODD)
    else:
        holder[chance.randrange(len(holder))] = chance.choice(ODD)
    return yaml.safe_dump(whole).encode() if name.endswith(".yaml") else json.dumps(whole).encode()


@pytest.mark.parametrize("kind", CASES)
def test_damaged_files_are_one_sentence(
    kind: str, world: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, command = CASES[kind]
    monkeypatch.chdir(world)
    whole = Path(name).read_bytes()

    @settings(
        max_examples=EXAMPLES or 12,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32))
    def try_one(seed: int) -> None:
        Path(name).write_bytes(damaged(whole, name, Random(seed)))
        check(command, capfd)

    try:
        try_one()
    finally:
        Path(name).write_bytes(whole)


def check(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code = cli.main([*command, *OPTIONS.get(command[0], [])])
    shutil.rmtree("made", ignore_errors=True)
    shutil.rmtree("trained", ignore_errors=True)
    out, error = capfd.readouterr()
    for never in ("Traceback", "site-packages", "weights_only", "panicked"):
        assert never not in out + error, error
    assert code in (0, 2), error
    lines = [line for line in error.splitlines() if not line.startswith("tessera: warning: ")]
    assert code == 0 or (len(lines) == 1 and lines[0].startswith("tessera: error: ")), error
