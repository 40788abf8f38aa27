"""A reranker loaded without open_clip against open_clip: the same features, texts, pictures, and the same refusals."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from rerank import ClipReranker, towers
from rerank.clip import WEIGHT_FILE, new_clip
from rerank.preprocessing import Preprocessing
from rerank.tokenizer import FileTokenizer
from tessera.text import TextTokenizer
from tests.conftest import TINY_CLIP

VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "head_width": 32}
TEXT = {"context_length": 12, "width": 32, "heads": 2, "layers": 2, "vocab_size": 50}
CONFIGS: dict[str, dict[str, Any]] = {
    "vit": {"vision_cfg": VIT, "text_cfg": TEXT},
    "vit with quick_gelu": {"vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True},
    "no norm before": {"vision_cfg": VIT | {"no_ln_pre": True}, "text_cfg": TEXT | {"pool_type": "eos"}},
    "norm after pooling": {
        "vision_cfg": VIT | {"final_ln_after_pool": True, "pool_type": "avg"},
        "text_cfg": TEXT | {"pool_type": "last", "no_causal_mask": True},
    },
    "mean of tokens": {
        "vision_cfg": VIT | {"pool_type": "avg", "mlp_ratio": 2.5},
        "text_cfg": TEXT | {"pool_type": "first", "mlp_ratio": 3},
    },
    "resnet": {"vision_cfg": RESNET, "text_cfg": TEXT | {"pool_type": "eos", "eos_id": 7}},
    "resnet with quick_gelu": {"vision_cfg": RESNET, "text_cfg": TEXT, "quick_gelu": True},
}
UNKNOWN: dict[str, dict[str, Any]] = {
    "a key of the model": {"init_logit_bias": -10.0},
    "a model class": {"custom_text": True},
    "a key of the image tower": {"vision_cfg": VIT | {"ls_init_value": 0.1}},
    "a key of the text tower": {"text_cfg": {"norm_kwargs": {"eps": 1e-6}}},
    "a block of the text tower": {"text_cfg": {"qk_norm": True}},
}


def random_model(config: dict[str, Any]) -> Any:
    """open_clip's, in eval mode, with no weight or running mean that it starts at zero or one left so."""
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**json.loads(json.dumps(config))).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.3)
    return model


@pytest.mark.parametrize("case", CONFIGS)
def test_features_equal_open_clips(case: str) -> None:
    config = {"embed_dim": 16} | CONFIGS[case]
    theirs, known = random_model(config), towers.known(config)
    assert known is not None
    ours = towers.CLIP(known).eval()
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randn(3, 3, *[config["vision_cfg"]["image_size"]] * 2)
    tokens = torch.randint(0, 50, (4, 12))
    with torch.no_grad():
        pairs = [(ours.encode_image(pixels), theirs.encode_image(pixels))]
        pairs += [(ours.encode_text(tokens), theirs.encode_text(tokens))]
    for own, expected in pairs:
        assert own.shape == expected.shape and expected.std() > 1e-3
        own, expected = F.normalize(own, dim=-1), F.normalize(expected, dim=-1)
        assert torch.allclose(own, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_key_goes_to_open_clip(case: str, tiny_text_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    changes = {name: TINY_CLIP.get(name, {}) | value if isinstance(value, dict) else value  # type: ignore[operator]
               for name, value in UNKNOWN[case].items()}  # fmt: skip
    torch.manual_seed(0)
    clip = new_clip(TINY_CLIP | changes, tiny_text_tokenizer)
    assert towers.known(clip.config["model_cfg"]) is None
    clip.save_pretrained(tmp_path / "reranker")
    loaded = ClipReranker.from_pretrained(tmp_path / "reranker")
    assert type(loaded.model).__module__.startswith("open_clip")
    assert isinstance(loaded.tokenizer, FileTokenizer)  # texts are read as by the prior all the same
    assert torch.equal(loaded.text_features(["a dog"]), clip.with_model(clip.model).text_features(["a dog"]))


def test_a_config_with_a_wrong_value_is_not_known() -> None:
    good = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}
    assert towers.known(good) is not None
    for wrong in (
        {"embed_dim": "16"},
        {"vision_cfg": VIT | {"layers": [1, 1]}},
        {"vision_cfg": VIT | {"width": 33}},
        {"vision_cfg": VIT | {"patch_size": 64}},
        {"text_cfg": TEXT | {"heads": 3}},
        {"text_cfg": TEXT | {"pool_type": "none"}},
    ):
        assert towers.known(good | wrong) is None


def test_a_folder_that_is_known_scores_as_open_clips_reranker(tiny_clip: ClipReranker, tmp_path: Path) -> None:
    tiny_clip.save_pretrained(tmp_path / "reranker")
    plain = ClipReranker.from_pretrained(tmp_path / "reranker")
    assert isinstance(plain.model, towers.CLIP) and isinstance(plain.tokenizer, FileTokenizer)
    assert not isinstance(tiny_clip.model, towers.CLIP)
    prompts, images = ["a dog", "红心", "a red heart & a “cat”"], torch.rand(5, 3, 40, 50) * 2 - 1
    assert torch.allclose(plain.scores(prompts, images), tiny_clip.scores(prompts, images), rtol=0, atol=1e-5)
    assert plain.fingerprint == tiny_clip.fingerprint
    assert json.dumps(plain.config) == json.dumps(tiny_clip.config)


def test_weights_of_another_layout_go_to_open_clip(tiny_clip: ClipReranker, tmp_path: Path) -> None:
    tiny_clip.save_pretrained(tmp_path / "reranker")
    state = {f"module.{name}": tensor for name, tensor in tiny_clip.model.state_dict().items()}
    save_file(state, tmp_path / "reranker" / WEIGHT_FILE)
    loaded = ClipReranker.from_pretrained(tmp_path / "reranker")
    assert not isinstance(loaded.model, towers.CLIP) and loaded.fingerprint == tiny_clip.fingerprint


# Texts ----------------------------------------------------------------------------------------------------------------

TEXTS = [
    "a red heart above a blue circle",
    "  two  spaces\tand\na line ",
    "",
    "红心在蓝色圆圈上方",
    "an <end> in the <pad> text",
    "fish &amp; chips, &lt;b&gt;, &amp;lt;",
    "â€œmojibakeâ€\x9d and “quotes” ﬁne",
    "\x1b[31mred\x1b[0m \x00 bell\x07",
    "a dog " * 40,
    "emoji 👩🏽‍🚀 e\u0301 \u00e9",
]


@pytest.fixture
def older_clip(tiny_text_tokenizer: TextTokenizer, tmp_path: Path) -> ClipReranker:
    """With a text tokenizer from before what cannot be seen was taken out."""
    content = json.loads(tiny_text_tokenizer.to_json())
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": " "}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    clip = new_clip(TINY_CLIP, TextTokenizer.from_pretrained(tmp_path))
    return clip.with_model(clip.model)


def test_texts_become_the_tokens_of_open_clip(older_clip: ClipReranker, tmp_path: Path) -> None:
    older_clip.save_pretrained(tmp_path / "reranker")
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'reranker'}")
    ours = FileTokenizer.from_folder(tmp_path / "reranker", 24)
    assert ours is not None and not isinstance(older_clip.tokenizer, FileTokenizer)
    random = np.random.default_rng(0)
    noise = ["".join(map(chr, random.integers(1, 0x500, 30))) for _ in range(50)]
    noise += ["".join(map(chr, random.integers(1, 128, 30))) for _ in range(50)]
    assert torch.equal(ours(TEXTS + noise), theirs(TEXTS + noise))


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_class": "CLIPTokenizerFast"},
        {"truncation_side": "left"},
        {"eos_token": "</s>"},
    ],
)
def test_a_tokenizer_that_asks_for_more_goes_to_transformers(
    tiny_clip: ClipReranker, tmp_path: Path, change: dict[str, str]
) -> None:
    tiny_clip.save_pretrained(tmp_path / "reranker")
    path = tmp_path / "reranker" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert FileTokenizer.from_folder(tmp_path / "reranker", 24) is None


# Pictures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, (32, 32), (24, 40)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pictures_are_preprocessed_as_by_open_clip(size: int | tuple[int, int], mode: str, interpolation: str) -> None:
    given = {"size": size, "resize_mode": mode, "interpolation": interpolation, "fill_color": 90}
    theirs, ours = image_transform_v2(PreprocessCfg(**given), is_train=False), Preprocessing.model_validate(given)
    random = np.random.default_rng(0)
    for width, height in ((32, 32), (50, 37), (31, 90), (16, 16), (200, 33), (41, 24)):
        picture = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for one in (picture, picture.convert("L"), picture.convert("RGBA"), picture.quantize(16)):
            assert torch.equal(ours.of_picture(one), theirs(one)), (one.size, one.mode)


def test_defaults_of_preprocessing_are_open_clips() -> None:
    assert json.dumps(Preprocessing().model_dump()) == json.dumps(asdict(PreprocessCfg()))
