"""ClipReranker against open_clip itself: the same scores, and never a model that was not loaded as a whole."""

import argparse
import json
import logging
import pickle
import shutil
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from rerank import ClipReranker
from rerank.clip import new_clip
from tessera.clip.folder import WEIGHT_FILE
from tessera.clip.model import CLIP
from tessera.errors import InputError
from tessera.images import to_pil, to_tensor
from tessera.text import END, PAD, TextTokenizer
from tests.conftest import CAPTIONS, TINY_CLIP

PROMPTS = ["a red heart above a blue circle", "红心在蓝色圆圈上方", "dog"]
RESNET = TINY_CLIP | {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}}
NAMED = "tiny-named-clip"  # a model of open_clip's list, with its CLIP tokenizer


def sample_images() -> list[Image.Image]:
    """PIL images of many shapes and modes, smooth and noisy."""
    random = np.random.default_rng(0)
    images = []
    for width, height in ((32, 32), (50, 37), (31, 90), (16, 16), (200, 33)):
        rough = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        images += [rough, rough.resize((5, 5)).resize((width, height), Image.Resampling.BICUBIC)]
    return [*images, images[2].convert("L"), images[4].convert("RGBA")]


def open_clip_scores(source: str, weights: str | None = None) -> Tensor:
    """open_clip's scores of PROMPTS and images, as in its README: (prompts, images)."""
    model, preprocess = open_clip.create_model_from_pretrained(source, pretrained=weights)
    tokenizer = open_clip.get_tokenizer(source)
    model.eval()
    with torch.no_grad():
        images = model.encode_image(torch.stack([preprocess(image) for image in sample_images()]))
        texts = model.encode_text(tokenizer(PROMPTS))
    return F.cosine_similarity(texts[:, None], images[None], dim=-1)


@pytest.fixture(scope="module")
def named_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Registers the config NAMED with open_clip, and makes weights for it in a local file."""
    folder = tmp_path_factory.mktemp("named")
    config = TINY_CLIP | {"text_cfg": {"context_length": 77, "width": 32, "heads": 2, "layers": 1}}
    (folder / f"{NAMED}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(1)
    state = open_clip.create_model(NAMED).state_dict()
    save_file(state, folder / "weights.safetensors")
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, folder / "trained.pt")
    return folder


@pytest.fixture(params=["vit", "resnet"])
def folder(request: pytest.FixtureRequest, tiny_text_tokenizer: TextTokenizer, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    clip = new_clip(TINY_CLIP if request.param == "vit" else RESNET, tiny_text_tokenizer)
    clip.model(torch.randn(8, 3, 32, 32), clip.tokenize(CAPTIONS * 2))  # moves batch norm's running means
    clip.with_model(clip.model).save_pretrained(tmp_path / "reranker")
    return tmp_path / "reranker"


@pytest.fixture
def copied(tiny_clip: ClipReranker, tmp_path: Path) -> Path:
    tiny_clip.save_pretrained(tmp_path / "reranker")
    return tmp_path / "reranker"


def refusal(*arguments: Any, **keywords: Any) -> str:
    """The sentence of the InputError that loading raises."""
    with pytest.raises(InputError) as caught:
        ClipReranker.from_pretrained(*arguments, **keywords)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 500
    return sentence


# Scores ---------------------------------------------------------------------------------------------------------------


def test_scores_equal_open_clips(folder: Path) -> None:
    reranker = ClipReranker.from_pretrained(folder)
    assert not reranker.model.training
    expected = open_clip_scores(f"local-dir:{folder}")
    for prompt, row in zip(PROMPTS, expected, strict=True):
        scores = reranker.score(prompt, sample_images())
        assert scores.shape == (len(sample_images()),) and scores.abs().max() <= 1
        assert torch.allclose(scores, row, rtol=0, atol=1e-5)
    assert torch.allclose(reranker.scores(PROMPTS, sample_images()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("file", ["weights.safetensors", "trained.pt"])
def test_a_named_model_with_a_local_file(named_weights: Path, file: str, tmp_path: Path) -> None:
    reranker = ClipReranker.from_pretrained(NAMED, named_weights / file)
    assert isinstance(reranker.model, CLIP)
    expected = open_clip_scores(NAMED, str(named_weights / file))
    assert torch.allclose(reranker.scores(PROMPTS, sample_images()), expected, rtol=0, atol=1e-5)
    reranker.save_pretrained(tmp_path / "saved")
    again = ClipReranker.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.scores(PROMPTS, sample_images()), reranker.scores(PROMPTS, sample_images()))
    assert again.fingerprint == reranker.fingerprint


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_tensors_are_preprocessed_as_pil_images_are(tiny_clip: ClipReranker, mode: str, interpolation: str) -> None:
    preprocessing = tiny_clip.config["preprocess_cfg"] | {"resize_mode": mode, "interpolation": interpolation}
    clip = ClipReranker(tiny_clip.model, tiny_clip.tokenizer, tiny_clip.config | {"preprocess_cfg": preprocessing})
    for image in sample_images()[:10]:
        expected = clip.preprocessing.from_image(image)
        levels = (clip.normalize(to_tensor(image)[None])[0] - expected).abs() * 127.5  # of 8 bits, as std is 0.5
        # PIL rounds to 8 bits after each of its two passes, and starts with the height where that is squashed most.
        squashed = mode == "squash" and image.height > 2 * image.width
        limit = 1e-3 if image.size == (32, 32) else 8 if squashed else 1.6
        assert levels.max() < limit, (image.size, levels.max())


def test_tensors_score_as_the_pil_images_they_become(tiny_clip: ClipReranker) -> None:
    torch.manual_seed(0)
    images = torch.rand(5, 3, 32, 32) * 2 - 1
    assert torch.allclose(tiny_clip.score("dog", images), tiny_clip.score("dog", to_pil(images)), rtol=0, atol=5e-3)


def test_a_score_does_not_depend_on_its_company(tiny_clip: ClipReranker) -> None:
    together = tiny_clip.scores(PROMPTS, sample_images())
    for column, image in enumerate(sample_images()):
        alone = torch.stack([tiny_clip.score(prompt, [image])[0] for prompt in PROMPTS])
        assert torch.allclose(alone, together[:, column], rtol=0, atol=1e-6)
    few = tiny_clip.image_features(sample_images(), batch_size=3)
    assert torch.allclose(few, tiny_clip.image_features(sample_images()), rtol=0, atol=1e-6)


def test_no_images_and_wrong_shapes_are_refused(tiny_clip: ClipReranker) -> None:
    with pytest.raises(InputError, match="no images"):
        tiny_clip.score("dog", [])
    with pytest.raises(InputError, match=r"must be \(N, 3, H, W\)"):
        tiny_clip.score("dog", torch.zeros(3, 32, 32))


# On disk --------------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(tiny_clip: ClipReranker, copied: Path) -> None:
    again = ClipReranker.from_pretrained(copied)
    assert sorted(path.name for path in copied.iterdir()) == sorted(
        [WEIGHT_FILE, "open_clip_config.json", "tokenizer.json", "tokenizer_config.json"]
    )
    for name, tensor in tiny_clip.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)
    again.save_pretrained(copied.parent / "again")
    for path in copied.iterdir():
        assert (copied.parent / "again" / path.name).read_bytes() == path.read_bytes()
        if path.suffix == ".json":
            assert "/" not in path.read_text().replace('"/"', "")  # no path of this machine


def test_half_precision_on_disk_and_in_memory(tiny_clip: ClipReranker, copied: Path) -> None:
    whole, expected = (copied / WEIGHT_FILE).stat().st_size, tiny_clip.scores(PROMPTS, sample_images())
    tiny_clip.save_pretrained(copied, dtype=torch.float16)
    assert (copied / WEIGHT_FILE).stat().st_size < 0.6 * whole
    halved = ClipReranker.from_pretrained(copied)
    assert next(halved.model.parameters()).dtype == torch.float32
    assert torch.allclose(halved.scores(PROMPTS, sample_images()), expected, rtol=0, atol=5e-3)
    rough = ClipReranker.from_pretrained(copied, dtype=torch.bfloat16)
    assert next(rough.model.parameters()).dtype == torch.bfloat16
    assert torch.allclose(rough.scores(PROMPTS, sample_images()), expected, rtol=0, atol=5e-2)


def test_the_fingerprint_changes_when_scores_do(tiny_clip: ClipReranker, copied: Path) -> None:
    fingerprint = tiny_clip.fingerprint
    tiny_clip.tokenize(["a longer text than any before"])  # sets padding and truncation inside the tokenizer
    assert ClipReranker.from_pretrained(copied).fingerprint == tiny_clip.fingerprint == fingerprint

    changed = {fingerprint}
    config = json.loads((copied / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.4]
    (copied / "open_clip_config.json").write_text(json.dumps(config))
    changed.add(ClipReranker.from_pretrained(copied).fingerprint)
    merges = json.loads((copied / "tokenizer.json").read_text())
    merges["model"]["merges"].pop()
    (copied / "tokenizer.json").write_text(json.dumps(merges))
    changed.add(ClipReranker.from_pretrained(copied).fingerprint)
    state = load_file(copied / WEIGHT_FILE)
    state["visual.proj"][0, 0] += 1e-3
    save_file(state, copied / WEIGHT_FILE)
    changed.add(ClipReranker.from_pretrained(copied).fingerprint)
    assert len(changed) == 4


# Training from scratch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"init_logit_bias": -10.0}], ids=["known", "open_clip's"])
def test_a_new_model_trains_and_says_nothing_on_the_log(
    changes: dict[str, float], tiny_text_tokenizer: TextTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    handlers = list(logging.getLogger().handlers)
    clip = new_clip(TINY_CLIP | changes, tiny_text_tokenizer)
    assert isinstance(clip.model, CLIP) is not bool(changes)
    assert not caplog.records and logging.getLogger().handlers == handlers
    assert clip.model.training
    outputs = clip.model(clip.normalize(torch.rand(2, 3, 40, 40)), clip.tokenize(CAPTIONS[:2]))
    open_clip.loss.ClipLoss()(*outputs).backward()
    assert all(weight.grad is not None for weight in clip.model.parameters())
    logging.getLogger().warning("something else")  # other lines still come through
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_texts_end_with_the_end_token(tiny_clip: ClipReranker, tiny_text_tokenizer: TextTokenizer) -> None:
    tokens = tiny_clip.tokenize(["a dog", "an <end> in the <pad> text", "a dog " * 40])
    assert tokens.shape == (3, 24)
    ids = tiny_text_tokenizer.encode("a dog")
    assert tokens[0].tolist() == [*ids, END, *[PAD] * (23 - len(ids))]
    assert tokens[1].tolist().count(END) == 1 and PAD not in tokens[1, : tokens[1].tolist().index(END)]
    assert tokens[2, -1] == END and PAD not in tokens[2]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"embed_dim": 16}, "needs text_cfg, vision_cfg"),
        (TINY_CLIP | {"colour": 1}, "colour"),
        (TINY_CLIP | {"vision_cfg": {"image_size": 32, "depth": 3}}, "depth"),
    ],
)
def test_a_config_that_is_none_of_open_clips(
    config: dict[str, Any], sentence: str, tiny_text_tokenizer: TextTokenizer
) -> None:
    with pytest.raises(InputError, match=sentence):
        new_clip(config, tiny_text_tokenizer)


# Wrong checkpoints ----------------------------------------------------------------------------------------------------


def change(edit: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        state = load_file(folder / WEIGHT_FILE)
        edit(state)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHT_FILE)

    return run


def drop_half(state: dict[str, Tensor]) -> None:
    for name in list(state)[::2]:
        del state[name]


def cut(name: str, size: int) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return run


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (remove(WEIGHT_FILE), f"has no {WEIGHT_FILE}"),
    "no config": (remove("open_clip_config.json"), "has no open_clip_config.json"),
    "no tokenizer": (remove("tokenizer.json"), "has no tokenizer.json"),
    "no tokenizer config": (remove("tokenizer_config.json"), "has no tokenizer_config.json"),
    "weights cut off": (cut(WEIGHT_FILE, 20_000), "are not this model's"),
    "weights cut off in the header": (cut(WEIGHT_FILE, 20), "are not this model's"),
    "empty weights": (cut(WEIGHT_FILE, 0), "are not this model's"),
    "config cut off": (cut("open_clip_config.json", 30), "is not valid JSON"),
    "tokenizer cut off": (cut("tokenizer.json", 500), "cannot load"),
    "tokenizer config cut off": (cut("tokenizer_config.json", 20), "cannot load"),
    "a tensor is missing": (change(lambda state: state.__delitem__("text_projection")), "text_projection"),
    "half of it": (change(drop_half), "are not this model's"),
    "a foreign tensor": (change(lambda state: state.update(extra=torch.zeros(2))), "extra"),
    "another shape": (change(lambda state: state.update({"visual.proj": torch.zeros(32, 8)})), "visual.proj"),
    "not a number": (
        change(lambda state: state.update({"visual.proj": torch.full((32, 16), torch.nan)})),
        "visual.proj is not finite",
    ),
    "another image size": (
        change(lambda state: state.update({"visual.positional_embedding": torch.zeros(5, 32)})),
        "size mismatch for visual.positional_embedding",
    ),
    "another context length": (
        change(lambda state: state.update({"positional_embedding": torch.zeros(77, 32)})),
        "size mismatch for positional_embedding",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_damaged_folder_is_one_sentence(copied: Path, case: str) -> None:
    damage, sentence = WRONG[case]
    damage(copied)
    error = refusal(copied)
    assert sentence in error and str(copied) in error


def test_a_pickle_with_code_in_it_is_not_run(copied: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (copied / "exploded",)

    (copied / WEIGHT_FILE).unlink()
    torch.save({"state_dict": Bomb()}, copied / "open_clip_pytorch_model.bin")
    assert "are not this model's" in refusal(copied)
    assert not (copied / "exploded").exists()


def test_a_config_of_another_model(copied: Path) -> None:
    path = copied / "open_clip_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({"preprocess_cfg": config["preprocess_cfg"]}))
    assert "has no model_cfg" in refusal(copied)
    config["model_cfg"]["vision_cfg"]["layers"] = 2
    path.write_text(json.dumps(config))
    assert "are not this model's" in refusal(copied)


def test_the_weights_of_another_named_model(named_weights: Path, tiny_clip: ClipReranker, copied: Path) -> None:
    assert "are not this model's" in refusal(NAMED, copied / WEIGHT_FILE)
    shutil.copy(named_weights / "weights.safetensors", named_weights / "cut.safetensors")
    cut("cut.safetensors", 1000)(named_weights)
    assert "are not this model's" in refusal(NAMED, named_weights / "cut.safetensors")


def test_weights_as_wrappers_and_trainings_save_them(
    named_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefixes, more than weights, classes that are not here, and before torch 1.6: the scores are the same."""
    state = load_file(named_weights / "weights.safetensors")
    expected = ClipReranker.from_pretrained(NAMED, named_weights / "weights.safetensors").fingerprint
    module = types.ModuleType("some_framework")
    exec("class Sampler:\n    pass", module.__dict__)
    monkeypatch.setitem(sys.modules, "some_framework", module)
    more = {"epoch": 3, "optimizer": {"state": {}}, "sampler": module.Sampler()}
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "model."):
        stored = {prefix + name: tensor for name, tensor in state.items()}
        torch.save({"state_dict": stored} | more, tmp_path / f"{prefix}pt")
        torch.save(stored, tmp_path / f"{prefix}old.pt", _use_new_zipfile_serialization=False)
        save_file(stored, tmp_path / f"{prefix}safetensors")
    monkeypatch.delitem(sys.modules, "some_framework")
    for path in sorted(tmp_path.iterdir()):
        assert ClipReranker.from_pretrained(NAMED, path).fingerprint == expected, path.name


def test_what_is_no_weight_file_is_called_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": [argparse.Namespace(a=1)]}, path)
    assert "holds no named tensors but objects of argparse.Namespace" in refusal(NAMED, path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is a Git LFS pointer" in refusal(NAMED, path)
    for content in (pickle.dumps([1]), b"PK\x03\x04 and no more"):
        path.write_bytes(content)
        sentence = refusal(NAMED, path)
        assert "damaged or not a torch checkpoint" in sentence
        assert "weights_only" not in sentence and "site-packages" not in sentence


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weights", "sentence"),
    [
        ("ViT-B-33", None, "'ViT-B-33' is neither a folder nor a model name of open_clip, did you mean 'ViT-B-32'?"),
        ("qqqqqqqqq", None, "open_clip.list_models() names them all"),
        ("/no/such/folder", None, "'/no/such/folder' is neither a folder nor"),
        ("RN50", None, "open_clip's RN50 needs weights: a file, or one of the tags openai, yfcc15m, cc12m"),
        ("RN50", "opennai", "'opennai' is neither a file nor a tag of open_clip's RN50, did you mean 'openai'?"),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "is neither a file nor a tag"),
    ],
)
def test_an_unknown_name_or_tag(name: str, weights: str | None, sentence: str) -> None:
    assert sentence in refusal(name, weights)


def test_a_folder_takes_no_weights(copied: Path) -> None:
    assert "leave weights=openai out" in refusal(copied, "openai")


@pytest.mark.parametrize(("name", "weights"), [("RN50", "openai"), ("ViT-B/32", "laion2b_s34b_b79k"), ("a/b", None)])
def test_without_a_network_a_download_fails_at_once(
    name: str, weights: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # refuses connections
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    start = time.perf_counter()
    assert "check the name and the network, or give local weights" in refusal(name, weights)
    assert time.perf_counter() - start < 10
    assert constants.HF_HUB_OFFLINE is False
