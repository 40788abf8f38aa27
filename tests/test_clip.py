"""Our CLIP against open_clip: the same features, initialisation, loss, gradients, texts and images."""

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
from torch import Tensor
from torch.nn import functional as F

from rerank import ClipReranker
from rerank.clip import new_clip
from tessera.clip.folder import WEIGHT_FILE
from tessera.clip.model import CLIP, CLIPConfig
from tessera.clip.preprocessing import Preprocessing
from tessera.clip.text import FileTokenizer
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
    "resnet with quick_gelu": {"vision_cfg": RESNET | {"patch_size": None}, "text_cfg": TEXT, "quick_gelu": True},
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


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"embed_dim": 16} | CONFIGS[request.param]


def built(config: dict[str, Any]) -> CLIP:
    known = CLIPConfig.known(config)
    assert known is not None
    return CLIP(known)


def inputs(config: dict[str, Any], n: int) -> tuple[Tensor, Tensor]:
    """Pixels (n, 3, S, S) and tokens (n, 12)."""
    side = config["vision_cfg"]["image_size"]
    return torch.randn(n, 3, side, side), torch.randint(0, 50, (n, 12))


@torch.no_grad()
def test_features_equal_open_clips(config: dict[str, Any]) -> None:
    theirs, ours = random_model(config), built(config).eval()
    ours.load_state_dict(theirs.state_dict())
    pixels, tokens = inputs(config, 4)
    pairs = [(ours.encode_image(pixels), theirs.encode_image(pixels))]
    pairs += [(ours.encode_text(tokens), theirs.encode_text(tokens))]
    for features, expected in pairs:
        assert features.shape == expected.shape and expected.std() > 1e-3
        features, expected = F.normalize(features, dim=-1), F.normalize(expected, dim=-1)
        assert torch.allclose(features, expected, rtol=0, atol=1e-5)


def test_a_seed_gives_the_new_model_that_it_gives_open_clip(config: dict[str, Any]) -> None:
    """All parameters and buffers, in the same order, which optimizer states in checkpoints go by."""
    torch.manual_seed(3)
    ours = built(config)
    torch.manual_seed(3)
    theirs = open_clip.model.CLIP(**json.loads(json.dumps(config)))
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, expected in theirs.state_dict().items():
        tensor = ours.state_dict()[name]
        assert tensor.dtype == expected.dtype
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7, msg=name)


def test_loss_and_gradients_of_training_equal_open_clips(config: dict[str, Any]) -> None:
    """From new weights and from others, in float64, because gradients through batch norm are sums that cancel."""
    torch.manual_seed(0)
    new = open_clip.model.CLIP(**json.loads(json.dumps(config)))
    contrastive = open_clip.loss.ClipLoss()
    for theirs in (new.double().train(), random_model(config).double().train()):
        ours = built(config).double().train()
        ours.load_state_dict(theirs.state_dict())
        pixels, tokens = inputs(config, 6)
        pixels = pixels.double()
        loss, expected = contrastive(*ours(pixels, tokens)), contrastive(*theirs(pixels, tokens))
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
        gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
        for name, parameter in theirs.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-8, msg=name)
        for name, buffer in theirs.named_buffers():
            if "running" in name:
                torch.testing.assert_close(ours.get_buffer(name), buffer)


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_key_goes_to_open_clip(case: str, tiny_text_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    changes = {name: TINY_CLIP.get(name, {}) | value if isinstance(value, dict) else value  # type: ignore[operator]
               for name, value in UNKNOWN[case].items()}  # fmt: skip
    torch.manual_seed(0)
    clip = new_clip(TINY_CLIP | changes, tiny_text_tokenizer)
    assert CLIPConfig.known(clip.config["model_cfg"]) is None
    clip.save_pretrained(tmp_path / "reranker")
    loaded = ClipReranker.from_pretrained(tmp_path / "reranker")
    assert type(loaded.model).__module__.startswith("open_clip")
    assert isinstance(loaded.tokenizer, FileTokenizer)  # texts are read as by the prior all the same
    assert torch.equal(loaded.text_features(["a dog"]), clip.with_model(clip.model).text_features(["a dog"]))


def test_a_config_with_a_wrong_value_is_not_known() -> None:
    good = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}
    assert CLIPConfig.known(good) is not None
    for wrong in (
        {"embed_dim": "16"},
        {"vision_cfg": VIT | {"layers": [1, 1]}},
        {"vision_cfg": VIT | {"width": 33}},
        {"vision_cfg": VIT | {"patch_size": 64}},
        {"text_cfg": TEXT | {"heads": 3}},
        {"text_cfg": TEXT | {"pool_type": "none"}},
    ):
        assert CLIPConfig.known(good | wrong) is None


def test_a_folder_that_is_known_scores_as_open_clips_model(tiny_clip: ClipReranker, tmp_path: Path) -> None:
    source = f"local-dir:{tmp_path / 'reranker'}"
    tiny_clip.save_pretrained(tmp_path / "reranker")
    ours = ClipReranker.from_pretrained(tmp_path / "reranker")
    assert isinstance(ours.model, CLIP) and isinstance(ours.tokenizer, FileTokenizer)
    model = open_clip.create_model(source, require_pretrained=True).eval()
    config = {"model_cfg": open_clip.get_model_config(source), "preprocess_cfg": model.visual.preprocess_cfg}
    assert json.dumps(ours.config) == json.dumps(config)
    theirs = ClipReranker(model, ours.tokenizer, config)
    prompts, images = ["a dog", "红心", "a red heart & a “cat”"], torch.rand(5, 3, 40, 50) * 2 - 1
    assert torch.allclose(ours.scores(prompts, images), theirs.scores(prompts, images), rtol=0, atol=1e-5)
    assert ours.fingerprint == theirs.fingerprint == tiny_clip.fingerprint


def test_weights_of_a_wrapped_model_are_the_models(tiny_clip: ClipReranker, tmp_path: Path) -> None:
    tiny_clip.save_pretrained(tmp_path / "reranker")
    state = {f"module.{name}": tensor for name, tensor in tiny_clip.model.state_dict().items()}
    state["module.logit_scale"] = state["module.logit_scale"][None]  # as some trainings keep it
    save_file(state, tmp_path / "reranker" / WEIGHT_FILE)
    loaded = ClipReranker.from_pretrained(tmp_path / "reranker")
    assert isinstance(loaded.model, CLIP) and loaded.fingerprint == tiny_clip.fingerprint


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
    """With a text tokenizer from before invisible characters were removed."""
    content = json.loads(tiny_text_tokenizer.to_json())
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": " "}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    clip = new_clip(TINY_CLIP, TextTokenizer.from_pretrained(tmp_path))
    return clip.with_model(clip.model)


def test_texts_become_the_tokens_of_open_clip(older_clip: ClipReranker, tmp_path: Path) -> None:
    older_clip.save_pretrained(tmp_path / "reranker")
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'reranker'}")
    ours = FileTokenizer.from_folder(tmp_path / "reranker", 24)
    assert ours is not None and ours.cleaning == "before"
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


# Images ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, (32, 32), (24, 40)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_images_are_preprocessed_as_by_open_clip(size: int | tuple[int, int], mode: str, interpolation: str) -> None:
    given = {"size": size, "resize_mode": mode, "interpolation": interpolation, "fill_color": 90}
    theirs, ours = image_transform_v2(PreprocessCfg(**given), is_train=False), Preprocessing.model_validate(given)
    random = np.random.default_rng(0)
    for width, height in ((32, 32), (50, 37), (31, 90), (16, 16), (200, 33), (41, 24)):
        rgb = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for image in (rgb, rgb.convert("L"), rgb.convert("RGBA"), rgb.quantize(16)):
            assert torch.equal(ours.from_image(image), theirs(image)), (image.size, image.mode)


def test_defaults_of_preprocessing_are_open_clips() -> None:
    assert json.dumps(Preprocessing().model_dump()) == json.dumps(asdict(PreprocessCfg()))
