"""Public tokenizers become ours: codes equal the reference's, pictures to 1e-4, and nothing in a file is executed.

`golden/` holds small random weights under each project's own names with what its code made of them, and, in text files,
the names and shapes of the published checkpoints. Other sizes are compared with the plain functions below, or with
transformers where it has the model.
"""

import importlib
import json
import os
import pickle
import re
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines import cli
from pipelines.cli.folders import Convertible
from pipelines.info import describe
from stage1_tokenizer import Autoencoder, AutoencoderConfig
from stage1_tokenizer.convert import FAMILIES, convert
from stage2_prior.convert import FAMILIES as PRIORS
from tessera.errors import InputError
from tessera.weights.pickles import Inert, module_tensors, read_pickle

GOLDEN = Path(__file__).parent / "golden"
Weights = dict[str, Tensor]


# The references -------------------------------------------------------------------------------------------------------


class Reference:
    """taming's VQGAN as plain functions of weights under taming's names."""

    def __init__(self, weights: Weights, levels: int, groups: int = 32, eps: float = 1e-6) -> None:
        self.w, self.levels, self.groups, self.eps = weights, levels, groups, eps

    def latents(self, images: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", images, padding=1)
        for level in range(self.levels):
            x = self.level(f"encoder.down.{level}", x)
            if level < self.levels - 1:
                x = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = self.middle("encoder.mid", x)
        x = self.conv("encoder.conv_out", F.silu(self.norm("encoder.norm_out", x)), padding=1)
        return self.conv("quant_conv", x)

    def decode(self, latents: Tensor) -> Tensor:
        self.q = latents
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", latents), padding=1)
        x = self.middle("decoder.mid", x)
        for level in reversed(range(self.levels)):
            x = self.level(f"decoder.up.{level}", x)
            if level:
                x = self.conv(f"decoder.up.{level}.upsample.conv", F.interpolate(x, scale_factor=2.0), padding=1)
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)), padding=1)

    def level(self, name: str, x: Tensor) -> Tensor:
        block = 0
        while f"{name}.block.{block}.conv1.weight" in self.w:
            x = self.block(f"{name}.block.{block}", x)
            if f"{name}.attn.{block}.q.weight" in self.w:
                x = self.attention(f"{name}.attn.{block}", x)
            block += 1
        return x

    def middle(self, name: str, x: Tensor) -> Tensor:
        x = self.block(f"{name}.block_1", x)
        x = self.attention(f"{name}.attn_1", x) if f"{name}.attn_1.q.weight" in self.w else x
        return self.block(f"{name}.block_2", x)

    def block(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.w else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")  # (B, C, h w)
        weights = (q.transpose(1, 2) @ k * x.shape[1] ** -0.5).softmax(-1)
        return x + self.conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))

    def norm(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.norm_layer.weight" in self.w:  # MoVQ's
            norm, q = f"{name}.norm_layer", F.interpolate(self.q, x.shape[2:])
            x = F.group_norm(x, 32, self.w[f"{norm}.weight"], self.w[f"{norm}.bias"], 1e-6)
            return x * self.conv(f"{name}.conv_y", q) + self.conv(f"{name}.conv_b", q)
        return F.group_norm(x, self.groups, self.w[f"{name}.weight"], self.w[f"{name}.bias"], self.eps)

    def conv(self, name: str, x: Tensor, **options: int) -> Tensor:
        return F.conv2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], **options)


def random_vqgan(
    stem: int = 32,
    widths: tuple[int, ...] = (32, 64),
    decoder_widths: tuple[int, ...] | None = None,
    blocks: int = 1,
    attended: tuple[int, ...] = (1,),
    decoder_attended: tuple[int, ...] | None = None,
    middle: bool = True,
    z: int = 12,
    dim: int = 6,
    codes: int = 40,
) -> Weights:
    """Random weights under taming's names."""
    torch.manual_seed(0)
    w: Weights = {}

    def conv(name: str, width_in: int, width: int, kernel: int = 3) -> None:
        w[f"{name}.weight"] = torch.randn(width, width_in, kernel, kernel) / (width_in * kernel**2) ** 0.5
        w[f"{name}.bias"] = torch.randn(width) * 0.1

    def norm(name: str, width: int) -> None:
        w[f"{name}.weight"], w[f"{name}.bias"] = 1 + torch.randn(width) * 0.1, torch.randn(width) * 0.1

    def block(name: str, width_in: int, width: int) -> None:
        norm(f"{name}.norm1", width_in)
        conv(f"{name}.conv1", width_in, width)
        norm(f"{name}.norm2", width)
        conv(f"{name}.conv2", width, width)
        if width_in != width:
            conv(f"{name}.nin_shortcut", width_in, width, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def mid(name: str, width: int) -> None:
        block(f"{name}.block_1", width, width)
        if middle:
            attention(f"{name}.attn_1", width)
        block(f"{name}.block_2", width, width)

    conv("encoder.conv_in", 3, stem)
    width = stem
    for level, wide in enumerate(widths):
        for number in range(blocks):
            block(f"encoder.down.{level}.block.{number}", width if number == 0 else wide, wide)
            if level in attended:
                attention(f"encoder.down.{level}.attn.{number}", wide)
        if level < len(widths) - 1:
            conv(f"encoder.down.{level}.downsample.conv", wide, wide)
        width = wide
    mid("encoder.mid", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", width, z)
    conv("quant_conv", z, dim, 1)
    w["quantize.embedding.weight"] = torch.randn(codes, dim)
    conv("post_quant_conv", dim, z, 1)
    widths = decoder_widths or widths
    width = widths[-1]
    conv("decoder.conv_in", z, width)
    mid("decoder.mid", width)
    for level, wide in reversed(list(enumerate(widths))):
        for number in range(blocks + 1):
            block(f"decoder.up.{level}.block.{number}", width if number == 0 else wide, wide)
            if level in (attended if decoder_attended is None else decoder_attended):
                attention(f"decoder.up.{level}.attn.{number}", wide)
        if level:
            conv(f"decoder.up.{level}.upsample.conv", wide, wide)
        width = wide
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", width, 3)
    return w


def to_llamagen(weights: Weights, levels: int) -> Weights:
    """The same weights under LlamaGen's names, with the statistic that its files hold."""
    found = {}
    for name, tensor in weights.items():
        name = re.sub(r"encoder\.down\.(\d+)\.block", r"encoder.conv_blocks.\1.res", name)
        name = re.sub(r"encoder\.down\.(\d+)", r"encoder.conv_blocks.\1", name)
        name = re.sub(r"decoder\.up\.(\d+)", lambda m: f"decoder.conv_blocks.{levels - 1 - int(m[1])}", name)
        name = re.sub(r"(decoder\.conv_blocks\.\d+)\.block", r"\1.res", name)
        for number, part in enumerate(("block_1", "attn_1", "block_2")):
            name = name.replace(f"mid.{part}", f"mid.{number}")
        found[name] = tensor
    return found | {"quantize.codebook_used": torch.zeros(65536)}


def to_diffusers(weights: Weights, levels: int, old: bool = False) -> Weights:
    """The same weights under diffusers' names; attention becomes linear layers, named as before 0.15 if `old`."""
    parts = dict(zip("qkv", ("query", "key", "value") if old else ("to_q", "to_k", "to_v"), strict=True))
    parts |= {"norm": "group_norm", "proj_out": "proj_attn" if old else "to_out.0"}
    found = {}
    for name, tensor in weights.items():
        attention = re.search(r"(attn\.\d+|attn_1)\.(norm|q|k|v|proj_out)\.", name)
        if attention:
            name = name.replace(f".{attention[2]}.", f".{parts[attention[2]]}.")
            tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 and attention[2] != "norm" else tensor
        name = re.sub(r"encoder\.down\.(\d+)", r"encoder.down_blocks.\1", name)
        name = re.sub(r"decoder\.up\.(\d+)", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}", name)
        name = re.sub(r"(blocks\.\d+)\.block\.", r"\1.resnets.", name)
        name = re.sub(r"(blocks\.\d+)\.attn\.", r"\1.attentions.", name)
        name = name.replace("downsample.conv", "downsamplers.0.conv").replace("upsample.conv", "upsamplers.0.conv")
        name = name.replace("mid.block_1", "mid_block.resnets.0").replace("mid.block_2", "mid_block.resnets.1")
        name = name.replace("mid.attn_1", "mid_block.attentions.0").replace("nin_shortcut", "conv_shortcut")
        found[name.replace("norm_out", "conv_norm_out")] = tensor
    return found


def nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """(B, D, h, w), (K, D) -> (B, h, w): by all the distances."""
    return (latents.movedim(1, -1).unsqueeze(-2) - codebook).square().sum(-1).argmin(-1)


def rows(codes: Tensor, codebook: Tensor) -> Tensor:
    return codebook[codes].movedim(-1, 1)


def images(height: int, width: int) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def converted(family: str, sources: list[Path], folder: Path) -> Autoencoder:
    return Autoencoder.from_pretrained(convert(family, sources, folder / "converted"))


def same_pictures(pictures: Tensor, expected: Tensor) -> None:
    """Equal to 1e-4; the references do not clamp to [-1, 1], we do."""
    assert expected.abs().min() < 0.5  # not all of it is clamped
    torch.testing.assert_close(pictures, expected.clamp(-1, 1), rtol=1e-4, atol=1e-4)


def wrapped(weights: Weights, path: Path) -> Path:
    torch.save({"state_dict": weights, "epoch": 3}, path)
    return path


# Golden data ----------------------------------------------------------------------------------------------------------


def golden(name: str) -> tuple[Weights, Weights]:
    """The weights under the reference's names, and inputs and outputs."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    return weights, {key: value for key, value in tensors.items() if not key.startswith("weights/")}


@pytest.mark.parametrize("family", ["taming-vqgan", "mindalle-vqgan"])  # their checkpoints have the same names
def test_golden_codes_and_pictures(family: str, tmp_path: Path) -> None:
    weights, data = golden("mindalle_vqgan")
    torch.save({"state_dict": weights}, tmp_path / "checkpoint.ckpt")
    tokenizer = converted(family, [tmp_path / "checkpoint.ckpt"], tmp_path)
    assert torch.equal(tokenizer.encode(data["in/image"]).flatten(), data["out/codes"].flatten())
    same_pictures(tokenizer.decode(data["in/codes"].unsqueeze(1)), data["out/decoded_codes"])


def test_golden_dvae_from_pickled_modules(tmp_path: Path) -> None:
    _, data = golden("openai_dvae")
    tokenizer = converted("openai-dvae", [GOLDEN / "decoder.pkl", GOLDEN / "encoder.pkl"], tmp_path)
    assert "dall_e" not in sys.modules
    assert torch.equal(tokenizer.encode(data["in/image"] * 2 - 1)[:, 0], data["out/codes"])
    same_pictures(tokenizer.decode(data["in/codes"].unsqueeze(1)), data["out/decoded_codes"] * 2 - 1)
    assert Autoencoder(tokenizer.config).fingerprint != tokenizer.fingerprint
    assert converted("openai-dvae", [GOLDEN], tmp_path).fingerprint == tokenizer.fingerprint


# Other sizes ----------------------------------------------------------------------------------------------------------

SIZES = [
    {},
    {"widths": (64, 32, 96), "stem": 32, "blocks": 2, "attended": (0, 2), "z": 5, "dim": 5, "codes": 17},
    {"widths": (32,), "attended": (), "middle": False},
]


@pytest.mark.parametrize("sizes", SIZES)
def test_taming_of_other_sizes(sizes: dict, tmp_path: Path) -> None:
    weights = random_vqgan(**sizes)
    levels = len(sizes.get("widths", (32, 64)))
    reference, codebook = Reference(weights, levels), weights["quantize.embedding.weight"]
    training = {"loss.logvar": torch.zeros(())}
    tokenizer = converted("taming-vqgan", [wrapped(weights | training, tmp_path / "last.ckpt")], tmp_path)
    codes = nearest(reference.latents(images(16, 24)), codebook)
    assert len(codes.unique()) > 5
    assert torch.equal(tokenizer.encode(images(16, 24))[:, 0], codes)
    same_pictures(tokenizer.decode(codes.unsqueeze(1)), reference.decode(rows(codes, codebook)))


@pytest.mark.parametrize("family", ["taming-vqgan", "rudalle-vqgan"])
def test_gumbel_codes_are_the_largest_logits(family: str, tmp_path: Path) -> None:
    weights = random_vqgan(z=6, dim=6)
    codebook = weights.pop("quantize.embedding.weight")
    weights |= {"quantize.embed.weight": codebook, "quantize.proj.bias": torch.randn(40)}
    weights["quantize.proj.weight"] = torch.randn(40, 6, 1, 1)
    inside = {f"first_stage_model.{name}": tensor for name, tensor in weights.items()}  # of a transformer's checkpoint
    stored = inside | {"transformer.head.weight": torch.zeros(2)} if family == "taming-vqgan" else weights
    tokenizer = converted(family, [wrapped(stored, tmp_path / "last.ckpt")], tmp_path)
    reference = Reference(weights, 2)
    codes = reference.conv("quantize.proj", reference.latents(images(8, 8))).argmax(1)
    assert torch.equal(tokenizer.encode(images(8, 8))[:, 0], codes)
    same_pictures(tokenizer.decode(codes.unsqueeze(1)), reference.decode(rows(codes, codebook)))


def test_the_detokenizer_decodes_and_refuses_to_encode(tmp_path: Path) -> None:
    weights = random_vqgan(widths=(32, 64, 64), attended=(2,))
    weights |= {"decoder.norm_out.weight": weights["decoder.norm_out.weight"] * 0.3}
    codebook = weights.pop("quantize.embedding.weight")
    decoder = {name: w for name, w in weights.items() if name.startswith(("decoder.", "post_quant_conv."))}
    torch.save({"embedding.weight": codebook, **decoder}, tmp_path / "detoker.pt")
    tokenizer = converted("min-dalle-detoker", [tmp_path / "detoker.pt"], tmp_path)
    codes = torch.randint(40, (2, 3, 5), generator=torch.Generator().manual_seed(2))
    drawn = Reference(weights, 3, eps=1e-5).decode(rows(codes, codebook))  # in [0, 1] where it is not clamped
    same_pictures(tokenizer.decode(codes.unsqueeze(1)), drawn * 2 - 1)
    with pytest.raises(InputError, match="has a decoder alone and cannot encode images"):
        tokenizer.encode(images(16, 16))
    with pytest.raises(InputError, match="cannot encode images"):
        tokenizer(images(16, 16))


@pytest.mark.parametrize(("family", "prefix"), [("llamagen-vq", ""), ("janus-vq", "gen_vision_model.")])
def test_llamagen_of_other_sizes(family: str, prefix: str, tmp_path: Path) -> None:
    weights = random_vqgan(widths=(64, 96, 32), decoder_widths=(32, 64, 64), blocks=2, attended=(2,))
    stored = {prefix + name: tensor for name, tensor in to_llamagen(weights, 3).items()}
    path = tmp_path / ("pytorch_model.bin" if prefix else "vq_ds4.pt")
    torch.save(stored | {"language_model.head.weight": torch.zeros(1)} if prefix else {"model": stored}, path)
    tokenizer = converted(family, [path], tmp_path)
    reference, codebook = Reference(weights, 3), F.normalize(weights["quantize.embedding.weight"], dim=1)
    codes = nearest(F.normalize(reference.latents(images(16, 8)), dim=1), codebook)
    assert torch.equal(tokenizer.encode(images(16, 8))[:, 0], codes)
    same_pictures(tokenizer.decode(codes.unsqueeze(1)), reference.decode(rows(codes, codebook)))
    assert tokenizer.image_size == (384 if prefix else 256)


def test_janus_does_what_transformers_does(tmp_path: Path) -> None:
    """With codes of unequal length too, which transformers compares as they are and decodes at length 1."""
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    config = JanusVQVAEConfig(
        embed_dim=5, num_embeddings=50, latent_channels=9, base_channels=32, channel_multiplier=[1, 2, 1],
        num_res_blocks=2, num_patches=3,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = JanusVQVAE(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) / max(parameter[0].numel(), 4) ** 0.5)
        theirs.quantize.embedding.weight.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer = converted("janus-vq", [tmp_path / "theirs"], tmp_path)
    assert tokenizer.image_size == 12
    with torch.no_grad():
        codes = theirs.encode(images(12, 12)).image_tokens.view(2, 1, 3, 3)
        expected = theirs.decode(codes.flatten(1))
    assert torch.equal(tokenizer.encode(images(12, 12)), codes) and len(codes.unique()) > 3
    same_pictures(tokenizer.decode(codes), expected)


@pytest.mark.parametrize(
    ("sizes", "groups", "old"),
    [
        ({"widths": (32, 64, 64), "attended": (1, 2), "decoder_attended": (2,)}, 32, False),
        ({"stem": 24, "widths": (24, 36), "blocks": 2, "attended": (), "middle": False}, 6, False),
        ({}, 16, True),
    ],
)
def test_diffusers_of_other_sizes(sizes: dict, groups: int, old: bool, tmp_path: Path) -> None:
    weights = random_vqgan(**sizes)
    levels = len(sizes.get("widths", (32, 64)))
    folder = tmp_path / "pipeline" / "vqvae"
    folder.mkdir(parents=True)
    settings = {"_class_name": "VQModel", "norm_num_groups": groups, "sample_size": 40}
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(
        {name: tensor.contiguous() for name, tensor in to_diffusers(weights, levels, old).items()},
        folder / "diffusion_pytorch_model.safetensors",
    )
    tokenizer = converted("diffusers-vq", [tmp_path / "pipeline"], tmp_path)
    reference, codebook = Reference(weights, levels, groups), weights["quantize.embedding.weight"]
    codes = nearest(reference.latents(images(8, 16)), codebook)
    assert torch.equal(tokenizer.encode(images(8, 16))[:, 0], codes) and tokenizer.image_size == 40
    same_pictures(tokenizer.decode(codes.unsqueeze(1)), reference.decode(rows(codes, codebook)))


def test_diffusers_with_spatial_norms(tmp_path: Path) -> None:
    weights = random_vqgan(z=6, dim=6)
    for name in [
        name for name in weights if name.startswith("decoder.") and re.search(r"norm\d?(_out)?\.weight", name)
    ]:
        module = name.removesuffix(".weight")
        for kind in ("weight", "bias"):
            weights[f"{module}.norm_layer.{kind}"] = weights.pop(f"{module}.{kind}")
        width = len(weights[f"{module}.norm_layer.bias"])
        for part in ("conv_y", "conv_b"):
            weights[f"{module}.{part}.weight"] = torch.randn(width, 6, 1, 1) / 4
            weights[f"{module}.{part}.bias"] = torch.randn(width) / 4
    (tmp_path / "movq").mkdir()
    (tmp_path / "movq" / "config.json").write_text(json.dumps({"norm_type": "spatial"}))
    stored = {
        re.sub(r"(decoder.*)group_norm\.(norm_layer|conv)", r"\1spatial_norm.\2", name): tensor.contiguous()
        for name, tensor in to_diffusers(weights, 2).items()
    }
    torch.save(stored, tmp_path / "movq" / "diffusion_pytorch_model.bin")
    tokenizer = converted("diffusers-vq", [tmp_path], tmp_path)
    reference, codebook = Reference(weights, 2), weights["quantize.embedding.weight"]
    codes = nearest(reference.latents(images(8, 16)), codebook)
    assert torch.equal(tokenizer.encode(images(8, 16))[:, 0], codes)
    same_pictures(tokenizer.decode(codes.unsqueeze(1)), reference.decode(rows(codes, codebook)))


def random_dvae(hidden: int, multipliers: tuple[int, ...], blocks: int, first: int, codes: int) -> list[Weights]:
    """Encoder and decoder under OpenAI's names."""
    torch.manual_seed(0)

    def conv(w: Weights, name: str, width_in: int, width: int, kernel: int) -> None:
        w[f"{name}.w"] = torch.randn(width, width_in, kernel, kernel) / (width_in * kernel**2) ** 0.5
        w[f"{name}.b"] = torch.randn(width) * 0.1

    halves = []
    for encoder in (True, False):
        w: Weights = {}
        widths = [hidden * m for m in (multipliers if encoder else multipliers[::-1])]
        width = widths[0] if encoder else first
        conv(w, "blocks.input", *((3, width, 7) if encoder else (codes, width, 1)))
        for group, wide in enumerate(widths, 1):
            for block in range(1, blocks + 1):
                name = f"blocks.group_{group}.block_{block}"
                if width != wide:
                    conv(w, f"{name}.id_path", width, wide, 1)
                inner, kernels = wide // 4, (3, 3, 3, 1) if encoder else (1, 3, 3, 3)
                sizes = zip((width, inner, inner, inner), (inner, inner, inner, wide), kernels, strict=True)
                for number, (a, b, kernel) in enumerate(sizes, 1):
                    conv(w, f"{name}.res_path.conv_{number}", a, b, kernel)
                width = wide
        conv(w, "blocks.output.conv", width, codes if encoder else 6, 1)
        halves.append(w)
    return halves


def run_dvae(w: Weights, x: Tensor, groups: int, blocks: int, resample) -> Tensor:
    def conv(name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, w[f"{name}.w"], w[f"{name}.b"], padding=w[f"{name}.w"].shape[-1] // 2)

    x = conv("blocks.input", x)
    for group in range(1, groups + 1):
        for block in range(1, blocks + 1):
            name, h = f"blocks.group_{group}.block_{block}", x
            for number in range(1, 5):
                h = conv(f"{name}.res_path.conv_{number}", F.relu(h))
            x = (conv(f"{name}.id_path", x) if f"{name}.id_path.w" in w else x) + h / (groups * blocks) ** 2
        x = resample(x) if group < groups else x
    return conv("blocks.output.conv", F.relu(x))


def test_dvae_of_other_sizes(tmp_path: Path) -> None:
    encoder, decoder = random_dvae(hidden=8, multipliers=(1, 3, 2), blocks=3, first=10, codes=30)
    torch.save(encoder, tmp_path / "encoder.pkl", _use_new_zipfile_serialization=False)  # as torch before 1.6
    torch.save(decoder, tmp_path / "decoder.pkl")
    tokenizer = converted("openai-dvae", [tmp_path], tmp_path)
    pixels = images(8, 12)
    logits = run_dvae(encoder, 0.8 * (pixels + 1) / 2 + 0.1, 3, 3, lambda x: F.max_pool2d(x, 2))
    codes = logits.argmax(1)
    assert torch.equal(tokenizer.encode(pixels)[:, 0], codes)
    one_hot = F.one_hot(codes, 30).movedim(-1, 1).float()
    drawn = run_dvae(decoder, one_hot, 3, 3, lambda x: F.interpolate(x, scale_factor=2.0))[:, :3]
    same_pictures(tokenizer.decode(codes.unsqueeze(1)), (drawn.sigmoid() - 0.1) / 0.8 * 2 - 1)


@pytest.mark.parametrize(
    ("family", "names", "file", "trunk", "codes"),
    [
        ("taming", "taming_vqgan_imagenet_f16_16384", "last.ckpt", (128, 1, 1, 2, 2, 4, 256), 16384),
        ("taming", "taming_vqgan_gumbel_f8", "last.ckpt", (128, 1, 1, 2, 4, 256), 8192),
        ("taming", "taming_vq_f8", "model.ckpt", (128, 1, 2, 2, 4, 4), 16384),
        ("mindalle", "mindalle_stage1", "stage1_last.ckpt", (128, 1, 1, 2, 2, 4, 256), 16384),
        ("min_dalle", "dalle_mini_detoker", "detoker.pt", (128, 1, 1, 2, 2, 4, 256), 16384),
        ("llamagen", "llamagen_vq_ds16", "vq_ds16_c2i.pt", (128, 1, 1, 2, 2, 4, 8), 16384),
        ("llamagen", "llamagen_vq_ds8", "vq_ds8_c2i.pt", (128, 1, 2, 2, 4, 8), 16384),
        ("janus", "janus_pro_1b", "model.safetensors", (128, 1, 1, 2, 2, 4, 8), 16384),
        ("openai_dvae", "openai_dvae", "encoder.pkl", (256, 1, 2, 4, 8, 128), 8192),
    ],
)
def test_published_checkpoints_are_covered(
    family: str, names: str, file: str, trunk: tuple, codes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every published name is used and none is missing, at full size, without memory."""
    tensors: Weights = {}
    for line in (GOLDEN / f"{names}.txt").read_text().splitlines():
        name, shape = line.split("\t")
        tensors[name] = torch.empty([int(side) for side in shape.split("x")], device="meta")

    def read_tensors(paths, keep=None) -> Weights:
        start = f"{paths[0].name}/"
        return {name.removeprefix(start): t for name, t in tensors.items() if "/" not in name or name.startswith(start)}

    module = importlib.import_module(f"stage1_tokenizer.convert.{family}")
    reader = importlib.import_module("stage1_tokenizer.convert.taming") if family == "mindalle" else module
    monkeypatch.setattr(reader, "read_tensors", read_tensors)
    for name in {file, "decoder.pkl"} if family == "openai_dvae" else {file}:
        (tmp_path / name).touch()
    config, weights = module.read(sorted(tmp_path.iterdir()))
    *widths, dim = trunk
    assert [config.trunk.channels, *config.trunk.multipliers] == widths and config.trunk.decoder_dim == dim
    assert config.bottleneck.codebook_size == codes
    assert weights["bottleneck.codebook"].shape == (codes, dim)


# What is said about it ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VQGAN as taming saves it; not to be written to."""
    return wrapped(random_vqgan(), tmp_path_factory.mktemp("taming") / "last.ckpt")


def test_the_command_converts_and_info_shows_the_origin(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"ddconfig": {"resolution": 64}, "n_embed": 40, "embed_dim": 6}
    (tmp_path / "model.yaml").write_text(json.dumps({"model": {"params": settings}}))
    sources = [str(checkpoint), str(tmp_path / "model.yaml")]
    assert cli.main(["convert", "taming-vqgan", *sources, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert Autoencoder.from_pretrained(tmp_path / "out").image_size == 64
    report = describe(tmp_path / "out")
    assert report["origin"] == {
        "family": "taming-vqgan",
        "project": "CompVis/taming-transformers",
        "files": ["last.ckpt"],
        "code_licence": "MIT",
        "weights_licence": "none stated apart from the code's",
        "weights": None,
    }
    assert cli.main(["info", str(tmp_path / "out")]) == 0
    assert "CompVis/taming-transformers" in (shown := capsys.readouterr().out) and "MIT" in shown
    assert cli.main(["convert", "taming-vqgan", sources[0], "-o", str(tmp_path / "out"), "--image-size", "128"]) == 0
    assert Autoencoder.from_pretrained(tmp_path / "out").image_size == 128


def test_the_command_knows_every_family() -> None:
    assert tuple(Convertible) == FAMILIES + PRIORS


def test_a_converted_codebook_does_not_start_anew_in_training(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = converted("taming-vqgan", [checkpoint], tmp_path)
    before = tokenizer.bottleneck.get_parameter("codebook").clone()
    tokenizer.train()(images(8, 8))
    assert torch.equal(tokenizer.bottleneck.get_parameter("codebook"), before)


def test_configs_without_the_new_fields_still_load() -> None:
    config = AutoencoderConfig.model_validate({"type": "autoencoder", "trunk": {"channels": 32}, "image_size": 32})
    names = Autoencoder(config).state_dict()
    assert config.trunk.type == "convolutional" and config.origin is None
    assert not any("quant_conv" in name for name in names) and "encoder.levels.0.2.conv.weight" in names


@pytest.mark.parametrize(
    ("trunk", "bottleneck"),
    [
        ({"code_dim": 3, "encoder_attention": [0], "stem_channels": 16}, {"type": "vq", "normalize": "both"}),
        ({"decoder_multipliers": [3, 1], "decoder_attention": [0, 1]}, {"type": "vq", "normalize": "lookup"}),
        ({"norm_eps": 1e-3}, {"type": "gumbel"}),
        ({"decoder": "modulated", "channels": 32, "code_dim": 3}, {"type": "vq"}),
        ({"type": "dvae", "channels": 8, "multipliers": [1, 2], "decoder_channels": 5}, {"type": "gumbel"}),
        ({"type": "dvae", "channels": 8, "multipliers": [1, 2], "latent_dim": 4}, {"type": "vq-ema"}),
    ],
)
def test_encode_then_decode_equals_forward(trunk: dict, bottleneck: dict) -> None:
    """What converters use, as a model like any other: gradients reach the encoder, and any size works."""
    sizes = {"channels": 8, "multipliers": [1, 2], "latent_dim": 4, "norm_groups": 4}
    settings = {"image_size": 8, "trunk": trunk if "type" in trunk else sizes | trunk}
    torch.manual_seed(0)
    model = Autoencoder(
        AutoencoderConfig.model_validate({**settings, "bottleneck": bottleneck | {"codebook_size": 16}})
    )
    output = model(images(8, 12))  # starts the codebook
    (output.images.square().mean() + output.bottleneck_loss).backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "conv_in" in name)
    output = model.eval()(images(8, 12))
    codes = model.encode(images(8, 12))
    assert torch.equal(codes, output.codes) and codes.shape == (2, 1, 4, 6)
    torch.testing.assert_close(model.decode(codes), output.images.clamp(-1, 1), rtol=0, atol=1e-5)


def test_a_bottleneck_that_needs_latents_of_one_width_says_so() -> None:
    with pytest.raises(ValueError, match="needs a latent_dim in the trunk"):
        AutoencoderConfig.model_validate({"trunk": {"type": "dvae"}, "bottleneck": {"type": "vq"}})


# Bad input ------------------------------------------------------------------------------------------------------------


def refused(family: str, sources: list[Path], folder: Path) -> str:
    """The sentence with which a conversion is refused; nothing is left behind."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError) as caught:
        convert(family, sources, folder / "refused")
    assert sorted(folder.rglob("*")) == before
    return str(caught.value)


def test_a_checkpoint_of_another_family_is_named(checkpoint: Path, tmp_path: Path) -> None:
    sentence = refused("llamagen-vq", [checkpoint], tmp_path)
    assert "is not a checkpoint of llamagen-vq" in sentence and "looks like taming-vqgan" in sentence
    torch.save({"model": to_llamagen(random_vqgan(), 2)}, tmp_path / "vq_ds2.pt")
    assert "looks like llamagen-vq" in refused("taming-vqgan", [tmp_path / "vq_ds2.pt"], tmp_path)
    assert "looks like openai-dvae" in refused("taming-vqgan", [GOLDEN / "encoder.pkl"], tmp_path)
    assert "has no 'quantize.embed.weight'" in refused("rudalle-vqgan", [checkpoint], tmp_path)
    assert "did you mean 'taming-vqgan'?" in refused("taming", [checkpoint], tmp_path)


def test_missing_left_over_and_unfitting_weights_are_named(tmp_path: Path) -> None:
    path, weights = tmp_path / "last.ckpt", random_vqgan()
    lacking = {name: tensor for name, tensor in weights.items() if name != "decoder.mid.attn_1.k.bias"}
    assert "lacks 1 weights: decoder.mid.attn_1.k.bias" in refused("taming-vqgan", [wrapped(lacking, path)], tmp_path)
    more = weights | {"decoder.extra.weight": torch.zeros(1)}
    assert "decoder.extra.weight" in refused("taming-vqgan", [wrapped(more, path)], tmp_path)
    wrong = weights | {"encoder.mid.block_1.conv1.weight": torch.zeros(64, 32, 3, 3)}
    assert "has shape (64, 32, 3, 3)" in refused("taming-vqgan", [wrapped(wrong, path)], tmp_path)
    double = weights | {"encoder.conv_out.weight": torch.zeros(24, 64, 3, 3)}
    assert "VAE without codes" in refused("taming-vqgan", [wrapped(double, path)], tmp_path)
    masks = weights | {"encoder.conv_in.weight": torch.zeros(32, 182, 3, 3)}
    assert "pictures of 182 channels" in refused("taming-vqgan", [wrapped(masks, path)], tmp_path)
    (tmp_path / "model.yaml").write_text("model: {params: {n_embed: 1024}}")
    sentence = refused("taming-vqgan", [wrapped(weights, path), tmp_path / "model.yaml"], tmp_path)
    assert "say n_embed 1024, but last.ckpt has 40" in sentence


def test_damaged_files_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    content = checkpoint.read_bytes()
    for damaged in (content[: len(content) // 2], content[:30], pickle.dumps(3)):
        path.write_bytes(damaged)
        assert "damaged or not a torch checkpoint" in refused("taming-vqgan", [path], tmp_path)
    torch.save(["no", "weights"], path)
    assert "holds no named tensors" in refused("taming-vqgan", [path], tmp_path)
    save_file(random_vqgan(), tmp_path / "whole.safetensors")
    path = tmp_path / "cut.safetensors"
    path.write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-100])
    assert "not a whole safetensors file" in refused("taming-vqgan", [path], tmp_path)
    with tarfile.open(tmp_path / "1.3B.tar.gz", "w:gz") as archive:
        archive.add(checkpoint, "stage1_last.ckpt")
    assert "unpack it" in refused("mindalle-vqgan", [tmp_path / "1.3B.tar.gz"], tmp_path)
    assert "neither a file nor a folder" in refused("taming-vqgan", [tmp_path / "none"], tmp_path)
    (tmp_path / "empty").mkdir()
    for family in FAMILIES:
        assert "needed" in refused(family, [tmp_path / "empty"], tmp_path)


class Bomb:
    """Unpickled in the usual way, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_never_run(tmp_path: Path) -> None:
    made, path = tmp_path / "made", tmp_path / "last.ckpt"
    torch.save(Bomb(made), path)
    assert "holds no named tensors" in refused("taming-vqgan", [path], tmp_path)
    torch.save({"state_dict": random_vqgan(), "callbacks": [Bomb(made)]}, path)
    assert converted("taming-vqgan", [path], tmp_path).codebook_size == 40
    torch.save({"state_dict": random_vqgan(), "callbacks": [Bomb(made)]}, path, _use_new_zipfile_serialization=False)
    assert converted("taming-vqgan", [path], tmp_path).codebook_size == 40
    path.write_bytes(pickle.dumps(Bomb(made)))
    assert "damaged or not" in refused("taming-vqgan", [path], tmp_path)
    assert not made.exists()


def test_classes_of_a_training_framework_are_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    framework = types.ModuleType("some_framework")
    exec("class Callback(dict):\n    pass\nclass Module:\n    pass", framework.__dict__)
    monkeypatch.setitem(sys.modules, "some_framework", framework)
    inner, outer = framework.Module(), framework.Module()
    inner._parameters = {"w": torch.nn.Parameter(torch.ones(2)), "none": None}
    outer._modules, outer._buffers = {"inner": inner, "again": inner}, {"b": torch.arange(3)}
    torch.save(
        {"state_dict": {"a": torch.arange(4).view(2, 2).T}, "hooks": framework.Callback(x=1), "m": outer},
        tmp_path / "f",
    )
    monkeypatch.delitem(sys.modules, "some_framework")
    content = read_pickle(tmp_path / "f")
    assert content["state_dict"]["a"].tolist() == [[0, 2], [1, 3]] and isinstance(content["hooks"], Inert)
    tensors = module_tensors(content["m"])
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "b": [0, 1, 2], "inner.w": [1, 1], "again.w": [1, 1],
    }  # fmt: skip


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(4)}, tmp_path / "f.pt")
    with zipfile.ZipFile(tmp_path / "f.pt") as whole, zipfile.ZipFile(tmp_path / "g.pt", "w") as changed:
        for entry in whole.namelist():
            content = whole.read(entry)
            if entry.endswith("data.pkl"):
                assert content.count(b"K\x04\x85") == 1  # the size (4,)
                content = content.replace(b"K\x04\x85", b"K\x09\x85")
            changed.writestr(entry, content)
    with pytest.raises(InputError, match="damaged"):
        read_pickle(tmp_path / "g.pt")


def test_what_cannot_be_converted_is_said(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQModel", "norm_type": "batch"}))
    save_file({"a": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert "asks for batch norms" in refused("diffusers-vq", [tmp_path], tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"norm_num_groups": 5}))
    stored = {name: tensor.contiguous() for name, tensor in to_diffusers(random_vqgan(), 2).items()}
    save_file(stored, tmp_path / "diffusion_pytorch_model.safetensors")
    assert "norm_groups 5 must divide the widths" in refused("diffusers-vq", [tmp_path], tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    assert "of a AutoencoderKL" in refused("diffusers-vq", [tmp_path], tmp_path)
    wavelet = wrapped({"model.decoder.idwt.filters": torch.zeros(1)}, tmp_path / "vqgan.ckpt")
    assert "wavelet" in refused("rudalle-vqgan", [wavelet], tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="is in the way"):
        convert("taming-vqgan", [checkpoint], tmp_path / "taken")
    with pytest.raises(InputError, match="divisible by the factor 2"):
        convert("taming-vqgan", [checkpoint], tmp_path / "odd", image_size=31)
    assert not (tmp_path / "odd").exists()
