"""`tessera evaluate tokenizer`: every figure against one computed apart, and what is missing is said."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from rerank.clip import new_clip
from stage1_tokenizer import Autoencoder
from stage1_tokenizer.evaluate import evaluate
from stage1_tokenizer.losses.perceptual import CLIPFeatures
from tessera.data.source import ImageFolder
from tessera.errors import InputError
from tessera.metrics import frechet_distance, psnr

RESNET = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
    "text_cfg": {"context_length": 24, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def resnet(tmp_path_factory, tiny_text_tokenizer):
    torch.manual_seed(0)
    clip = new_clip(RESNET, tiny_text_tokenizer)
    folder = tmp_path_factory.mktemp("clip") / "clip"
    clip.with_model(clip.model).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_figures_are_those_of_the_reconstructions(tiny_parts, folder, resnet, tmp_path):
    lines = tmp_path / "figures.jsonl"
    report = evaluate(tiny_parts / "image_tokenizer", folder, batch_size=5, clip=resnet, per_image=lines)

    tokenizer, data = Autoencoder.from_pretrained(tiny_parts / "image_tokenizer"), ImageFolder(folder, 16)
    images = torch.stack([data.read(i) for i in range(12)])
    decoded = tokenizer.decode(tokenizer.encode(images))
    features = CLIPFeatures(resnet, (0, 1, 2, 3))
    assert report["psnr"] == pytest.approx(float(psnr(decoded, images).mean()), abs=1e-2)
    assert report["clip_distance"] == pytest.approx(float(features(decoded, images)), abs=1e-3)
    expected = frechet_distance(features.embed(decoded), features.embed(images))
    assert report["clip_frechet"] == pytest.approx(expected, abs=1e-3)
    assert 0 < report["ssim"] < 1 and set(report["left_out"]) == {"lpips", "rfid"}

    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["file_name"] for row in rows] == [f"{i:02d}.png" for i in range(12)]
    for name in ("psnr", "ssim", "clip_distance"):
        assert sum(row[name] for row in rows) / 12 == pytest.approx(report[name], abs=1e-3)


def test_weights_of_something_else_are_refused(tiny_parts, folder, tmp_path):
    (tmp_path / "other.pth").write_bytes(b"weights")
    model = tiny_parts / "image_tokenizer"
    with pytest.raises(InputError, match="other.pth is not weights-inception-2015-12-05-6726825d.pth"):
        evaluate(model, folder, inception_weights=tmp_path / "other.pth")
    with pytest.raises(InputError, match="cannot read the weights of Inception .*No such file"):
        evaluate(model, folder, inception_weights=tmp_path / "missing.pth")
    with pytest.raises(InputError, match="other.pth cannot be read as weights"):
        evaluate(model, folder, lpips=tmp_path / "other.pth")
    with pytest.raises(InputError, match="has no open_clip_config.json"):
        evaluate(model, folder, clip=tmp_path)


def test_one_picture_has_no_frechet_distance(tiny_parts, resnet, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "one.png")
    with pytest.raises(InputError, match="has 1 picture, a Fréchet distance needs at least 2"):
        evaluate(tiny_parts / "image_tokenizer", tmp_path, clip=resnet)


@torch.no_grad()
@pytest.mark.parametrize("stages", [(0, 1, 2, 3), (2,), (0, 4), (3, 1)])
def test_the_features_of_a_clip_are_those_of_its_stages(resnet, stages):
    """Against open_clip's own tower, stage by stage: unit length along the channels, distances averaged over stages."""
    torch.manual_seed(0)
    images, reference = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    features = CLIPFeatures(resnet, stages)
    tower = open_clip.create_model(f"local-dir:{resnet}").visual.eval()
    mean, std = (torch.tensor(tower.preprocess_cfg[key]) for key in ("mean", "std"))

    def expected(images):
        x = tower.stem(((images + 1) / 2 - mean[:, None, None]) / std[:, None, None])
        found = {0: x}
        for stage in range(1, 5):
            found[stage] = x = getattr(tower, f"layer{stage}")(x)
        return [found[stage] / found[stage].norm(dim=1, keepdim=True).clamp_min(1e-6) for stage in sorted(stages)]

    for ours, theirs in zip(features.features(images), expected(images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    pairs = zip(expected(images), expected(reference), strict=True)
    distance = sum((a - b).square().sum(1).mean() for a, b in pairs) / len(stages)
    torch.testing.assert_close(features(images, reference), distance, rtol=1e-4, atol=1e-5)
    assert float(features(images, images)) == 0 and not features.train().training
    assert not any(parameter.requires_grad for parameter in features.parameters())


@torch.no_grad()
def test_embeddings_of_a_clip_are_open_clips(resnet):
    features, model = CLIPFeatures(resnet, (0,)), open_clip.create_model(f"local-dir:{resnet}").eval()
    mean, std = (torch.tensor(model.visual.preprocess_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = torch.rand(2, 3, 32, 32)
    theirs = model.encode_image((images - mean) / std)
    torch.testing.assert_close(features.embed(images * 2 - 1), theirs, rtol=1e-4, atol=1e-5)
    large = images.repeat_interleave(2, -1).repeat_interleave(2, -2)  # comes down to nearly what it was made from
    assert float((features.embed(large * 2 - 1) - theirs).norm() / theirs.norm()) < 0.5


@torch.no_grad()
def test_a_clip_that_only_open_clip_builds_has_features(tiny_text_tokenizer, tmp_path):
    torch.manual_seed(0)
    clip = new_clip(RESNET | {"text_cfg": RESNET["text_cfg"] | {"ls_init_value": 0.1}}, tiny_text_tokenizer)
    clip.save_pretrained(tmp_path / "clip")
    images, features = torch.rand(2, 3, 32, 32) * 2 - 1, CLIPFeatures(tmp_path / "clip", (0, 2))
    assert [feature.shape for feature in features.features(images)] == [(2, 8, 8, 8), (2, 64, 4, 4)]
    torch.testing.assert_close(features.embed(images), clip.model.eval().encode_image(images))


def test_a_tower_that_is_no_resnet_is_refused(tiny_clip, tmp_path):
    tiny_clip.save_pretrained(tmp_path / "clip")
    with pytest.raises(InputError, match="must hold a CLIP with a ResNet image tower, got ViT"):
        CLIPFeatures(tmp_path / "clip", (0,))


@pytest.mark.parametrize("stages", [(5,), (-1, 2)])
def test_stages_that_a_tower_does_not_have_are_refused(resnet, stages):
    with pytest.raises(InputError, match="stages must be among 0 to 4"):
        CLIPFeatures(resnet, stages)


def test_broken_pictures_are_skipped_named_and_left_out_of_the_figures(tiny_parts, folder, tmp_path, capsys):
    data = Path(shutil.copytree(folder, tmp_path / "data"))
    names = sorted(path.name for path in data.glob("*.png"))
    (data / names[3]).write_bytes(b"broken")
    report = evaluate(tiny_parts / "image_tokenizer", data, batch_size=5, per_image=tmp_path / "rows.jsonl")
    assert (report["pictures"], report["unreadable"]) == (len(names) - 1, 1)
    assert f"skipped: {data / names[3]} is not a readable picture" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    whole = evaluate(tiny_parts / "image_tokenizer", folder, per_image=tmp_path / "whole.jsonl")
    expected = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert rows == [row for row in expected if row["file_name"] != names[3]] and whole["unreadable"] == 0
