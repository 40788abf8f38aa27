"""Tokenizers with taming's names that are something else: IBQ, SBER-MoVQGAN, Chameleon's."""

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines import cli
from stage1_tokenizer import Autoencoder
from stage1_tokenizer.bottlenecks import VQConfig, build_bottleneck
from stage1_tokenizer.convert import convert
from tessera.errors import InputError
from tests.test_convert_tokenizers import (
    Reference,
    converted,
    images,
    nearest,
    random_vqgan,
    rows,
    same_pictures,
    wrapped,
)

IBQ = "src.IBQ.models.ibqgan.IBQ"


def largest_product(latents: Tensor, codebook: Tensor) -> Tensor:
    """(B, D, h, w), (K, D) -> (B, h, w): one position after another, as IBQ's paper has it (section 3.2)."""
    codes = torch.zeros(latents.shape[0], *latents.shape[2:], dtype=torch.int64)
    for b, y, x in torch.cartesian_prod(*(torch.arange(n) for n in codes.shape)).tolist():
        logits = torch.stack([(latents[b, :, y, x] * code).sum() for code in codebook])
        codes[b, y, x] = logits.softmax(0).max(0)[1]
    return codes


# IBQ ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ["LightningCLI", "Emu3.5", "none"])
def test_ibq_takes_the_largest_dot_product(settings: str, tmp_path: Path) -> None:
    weights = random_vqgan(widths=(32, 64, 64), attended=(2,), codes=60)
    weights["quantize.embedding.weight"] *= torch.linspace(0.2, 2, 60)[:, None]  # where it is not the nearest
    arguments = {"embed_dim": 6, "n_embed": 60, "ddconfig": {"resolution": 64}, "sample_minimization_weight": 1.0}
    content = {
        "LightningCLI": {"model": {"class_path": IBQ, "init_args": arguments}},
        "Emu3.5": arguments,
    }
    path = wrapped(weights, tmp_path / "model.ckpt")
    if settings in content:
        (tmp_path / "config.yaml").write_text(json.dumps(content[settings]))
    tokenizer = converted("ibq-vq", [tmp_path], tmp_path)
    reference, codebook = Reference(weights, 3), weights["quantize.embedding.weight"]
    latents = reference.latents(images(16, 24))
    codes = largest_product(latents, codebook)
    assert (codes != nearest(latents, codebook)).float().mean() > 0.5
    assert torch.equal(tokenizer.encode(images(16, 24))[:, 0], codes) and len(codes.unique()) > 3
    assert torch.equal(tokenizer(images(16, 24)).codes[:, 0], codes)
    same_pictures(tokenizer.decode(codes.unsqueeze(1)), reference.decode(rows(codes, codebook)))
    assert tokenizer.image_size == (64 if settings in content else 256)
    assert path.is_file()


def test_the_bottleneck_of_ibq_trains_and_keeps_its_law() -> None:
    torch.manual_seed(0)
    vq = build_bottleneck(VQConfig(codebook_size=16, metric="dot-product"), 4)
    z = torch.randn(2, 4, 3, 5, requires_grad=True)
    vq(z)  # starts from the data
    output = vq.eval()(z)
    (output.latents.sum() + output.loss).backward()
    assert z.grad is not None and z.grad.any()
    torch.testing.assert_close(vq.lookup(output.codes), output.latents, rtol=0, atol=0)
    assert torch.equal(output.codes[:, 0], largest_product(z.detach(), vq.get_parameter("codebook").detach()))


def hyperparameters(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """As Lightning saves them, in a class of its own."""
    module = types.ModuleType("lightning_data")
    exec("class AttributeDict(dict):\n    pass", module.__dict__)
    monkeypatch.setitem(sys.modules, "lightning_data", module)
    return {"model": module.AttributeDict(target=IBQ, n_embed=40)}


@pytest.mark.parametrize("family", ["taming-vqgan", "chameleon-vq"])
def test_what_says_that_it_is_ibq_is_not_taken_for_taming(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config = wrapped(random_vqgan(), tmp_path / "last.ckpt"), tmp_path / "config.yaml"
    for content in (
        {"model": {"target": IBQ, "params": {"embed_dim": 6}}},
        {"model": {"class_path": IBQ, "init_args": {"embed_dim": 6}}},
        {"embed_dim": 6, "ddconfig": {}, "entropy_temperature": 0.01},
    ):
        config.write_text(json.dumps(content))
        with pytest.raises(InputError, match="convert it as ibq-vq"):
            convert(family, [path, config], tmp_path / "out")
    torch.save({"state_dict": random_vqgan(), "hyper_parameters": hyperparameters(monkeypatch)}, path)
    monkeypatch.delitem(sys.modules, "lightning_data")
    with pytest.raises(InputError, match="convert it as ibq-vq"):
        convert(family, [path], tmp_path / "out")
    config.write_text(json.dumps({"model": {"target": "src.IBQ.models.ibqgan.VQModel", "params": {"embed_dim": 6}}}))
    convert(family, [wrapped(random_vqgan(), path), config], tmp_path / "out")  # SEED-Voken's plain VQ
    with pytest.raises(InputError, match=r"is of src.IBQ.models.ibqgan.VQModel and not an IBQ.*taming-vqgan"):
        convert("ibq-vq", [path, config], tmp_path / "other")


def test_ibq_of_other_kinds_is_refused(tmp_path: Path) -> None:
    path, config = wrapped(random_vqgan(), tmp_path / "last.ckpt"), tmp_path / "config.yaml"
    config.write_text(json.dumps({"model": {"target": IBQ, "params": {"embed_dim": 6, "cosine_similarity": True}}}))
    with pytest.raises(InputError, match="only plain IBQ"):
        convert("ibq-vq", [path, config], tmp_path / "out")


# MoVQGAN --------------------------------------------------------------------------------------------------------------


def spatial(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with MoVQ's norms in the decoder, under the names of ai-forever/MoVQGAN."""
    torch.manual_seed(3)
    found = dict(weights)
    for name in [name for name in weights if re.fullmatch(r"decoder\..*norm\d?(_out)?\.weight", name)]:
        module = name.removesuffix(".weight")
        width = len(weights[name])
        for kind in ("weight", "bias"):
            found[f"{module}.norm_layer.{kind}"] = found.pop(f"{module}.{kind}")
        for part in ("conv_y", "conv_b"):
            found[f"{module}.{part}.weight"] = torch.randn(width, len(weights["quant_conv.bias"]), 1, 1) / 4
            found[f"{module}.{part}.bias"] = torch.randn(width) / 4
    return found


@pytest.mark.parametrize(
    "sizes", [{"z": 6, "dim": 6}, {"widths": (64, 32, 96), "blocks": 2, "attended": (0, 2), "dim": 4}]
)
def test_movqgan(sizes: dict, tmp_path: Path) -> None:
    weights = spatial(random_vqgan(**sizes))
    counted = {"ema_encoder.decay": torch.tensor(0.9), "ema_encoder.num_updates": torch.tensor(1)}
    wrapped(weights | counted, tmp_path / "movqgan_270M.ckpt")
    arguments = {"embed_dim": len(weights["quant_conv.bias"]), "n_embed": 40, "ddconfig": {"resolution": 64}}
    content = {"model": {"target": "movqgan.models.vqgan.MOVQ", "params": arguments}}
    (tmp_path / "movqgan_270M.yaml").write_text(json.dumps(content))
    tokenizer = converted("sber-movqgan", [tmp_path], tmp_path)
    reference, codebook = Reference(weights, len(sizes.get("widths", (32, 64)))), weights["quantize.embedding.weight"]
    codes = nearest(reference.latents(images(16, 24)), codebook)
    assert torch.equal(tokenizer.encode(images(16, 24))[:, 0], codes) and tokenizer.image_size == 64
    same_pictures(tokenizer.decode(codes.unsqueeze(1)), reference.decode(rows(codes, codebook)))
    with pytest.raises(InputError, match="convert it as sber-movqgan"):
        convert("taming-vqgan", [tmp_path], tmp_path / "other")


def test_a_plain_vqgan_is_no_movqgan(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a checkpoint of sber-movqgan.* looks like taming-vqgan"):
        convert("sber-movqgan", [wrapped(random_vqgan(), tmp_path / "last.ckpt")], tmp_path / "out")


# Chameleon ------------------------------------------------------------------------------------------------------------


def chameleon() -> tuple[Any, dict[str, Tensor]]:
    """transformers' encoder of it, small and random, and its weights with the decoder that is left out there."""
    from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    config = ChameleonVQVAEConfig(
        embed_dim=6, num_embeddings=50, latent_channels=6, base_channels=32, channel_multiplier=[1, 2, 1],
        num_res_blocks=2, resolution=64, attn_resolutions=None, attn_type="vanilla",
    )  # fmt: skip
    weights = random_vqgan(widths=(32, 64, 32), blocks=2, attended=(), z=6, dim=6, codes=50)
    theirs = ChameleonVQVAE(config).eval()
    theirs.load_state_dict({name: weights[name] for name in theirs.state_dict()})
    return theirs, weights


def test_chameleon_gives_the_codes_of_transformers_and_the_pictures_of_taming(tmp_path: Path) -> None:
    theirs, weights = chameleon()
    folder = tmp_path / "chameleon" / "tokenizer"
    folder.mkdir(parents=True)
    wrapped(weights | {"loss.discriminator.main.0.weight": torch.ones(2)}, folder / "vqgan.ckpt")
    (folder / "text_tokenizer.json").write_text("{}")
    tokenizer = converted("chameleon-vq", [tmp_path / "chameleon"], tmp_path)
    assert tokenizer.image_size == 512
    with torch.no_grad():
        codes = theirs.encode(images(16, 24)).image_tokens.view(2, 1, 4, 6)
    assert torch.equal(tokenizer.encode(images(16, 24)), codes) and len(codes.unique()) > 5
    expected = Reference(weights, 3).decode(rows(codes[:, 0], weights["quantize.embedding.weight"]))
    same_pictures(tokenizer.decode(codes), expected)
    arguments = {"embed_dim": 6, "n_embed": 50, "ddconfig": {"resolution": 64}}
    (folder / "vqgan.yaml").write_text(json.dumps({"model": {"params": arguments}}))
    assert converted("chameleon-vq", [folder], tmp_path).image_size == 64


@pytest.mark.parametrize("prefix", ["", "model.vqmodel."])
def test_transformers_chameleon_has_no_decoder(prefix: str, tmp_path: Path) -> None:
    stored = {prefix + name: tensor for name, tensor in chameleon()[0].state_dict().items()}
    torch.save(stored | {"lm_head.weight": torch.ones(1)} if prefix else stored, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="leaves the decoder out; give vqgan.ckpt"):
        convert("chameleon-vq", [tmp_path], tmp_path / "out")


def test_info_names_the_families(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrapped(random_vqgan(), tmp_path / "vqgan.ckpt")
    for family, project in (("ibq-vq", "TencentARC/SEED-Voken"), ("chameleon-vq", "facebookresearch/chameleon")):
        assert cli.main(["convert", family, str(tmp_path / "vqgan.ckpt"), "--out", str(tmp_path / "out")]) == 0
        assert cli.main(["info", str(tmp_path / "out")]) == 0
        assert project in capsys.readouterr().out
        assert Autoencoder.from_pretrained(tmp_path / "out").codebook_size == 40
