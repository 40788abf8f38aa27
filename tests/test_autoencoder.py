import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from stage1_tokenizer import Autoencoder, AutoencoderConfig
from stage1_tokenizer.bottlenecks import (
    BottleneckConfig,
    FSQConfig,
    GaussianConfig,
    GumbelConfig,
    HierarchyConfig,
    IdentityConfig,
    LFQConfig,
    ResidualConfig,
    SimVQConfig,
    VQConfig,
    VQEMAConfig,
)
from stage1_tokenizer.convolutions import TrunkConfig
from stage1_tokenizer.losses.pixels import PixelKind
from stage2_prior import sample
from stage2_prior.base import flatten_codes, unflatten_codes
from tessera.errors import InputError
from tessera.weights.folder import fingerprint
from tests.conftest import tiny_prior


def tiny(bottleneck: BottleneckConfig | None = None, pixels: PixelKind = "values", **trunk) -> Autoencoder:
    torch.manual_seed(0)
    sizes = dict(channels=8, multipliers=(1, 2), encoder_blocks=1, decoder_blocks=1, latent_dim=4, norm_groups=4)
    config = AutoencoderConfig(
        image_size=16,
        trunk=TrunkConfig(**{**sizes, **trunk}),
        bottleneck=bottleneck or VQEMAConfig(codebook_size=32),
        pixels=pixels,
    )
    model = Autoencoder(config)
    model(torch.rand(2, 3, 16, 16) * 2 - 1)  # starts the codebook
    return model.eval()


@pytest.mark.parametrize(
    "bottleneck",
    [
        VQConfig(codebook_size=32),
        VQEMAConfig(codebook_size=32, gradient="rotation"),
        VQConfig(codebook_size=32, normalize="both"),
        SimVQConfig(codebook_size=32),
        ResidualConfig(codebook_size=32),
        HierarchyConfig(codebook_size=32),
        GumbelConfig(codebook_size=32),
        FSQConfig(levels=(5, 4)),
        LFQConfig(codebook_size=32),
    ],
    ids=lambda config: config.type,
)
@pytest.mark.parametrize(
    "trunk", [{}, {"patch_size": 4}, {"multipliers": (1, 1, 2), "attention": False}, {"encoder": "patchwise"}]
)
def test_encode_then_decode_equals_forward(bottleneck, trunk):
    model = tiny(bottleneck, **trunk)
    images = torch.rand(2, 3, 16, 32) * 2 - 1
    output = model(images)
    codes = model.encode(images)
    assert torch.equal(codes, output.codes)
    assert codes.shape == (2, model.bottleneck.num_codebooks, 16 // model.factor, 32 // model.factor)
    torch.testing.assert_close(model.decode(codes), output.images.clamp(-1, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.decode_latents(model.encode_latents(images)), model.decode(codes))


@pytest.mark.parametrize("bottleneck", [IdentityConfig(), GaussianConfig()], ids=lambda config: config.type)
def test_a_continuous_tokenizer_gives_latents_and_refuses_codes(bottleneck, tmp_path):
    model = tiny(bottleneck)
    images = torch.rand(2, 3, 16, 32) * 2 - 1
    latents = model.encode_latents(images)
    assert model.continuous and latents.shape == (2, 4, 8, 16) and model(images).codes is None
    torch.testing.assert_close(model.decode_latents(latents), model(images).images.clamp(-1, 1), rtol=0, atol=1e-5)
    for refused in (
        lambda: model.encode(images),
        lambda: model.decode(torch.zeros(1, 1, 8, 8, dtype=torch.int64)),
        lambda: model.codebook_size,
        lambda: model.code_shape,
    ):
        with pytest.raises(InputError, match=r"is continuous \(.*\) and has no codes"):
            refused()
    with pytest.raises(InputError, match=r"latents must be \(B, 4, h, w\), got \(1, 3, 8, 8\)"):
        model.decode_latents(torch.zeros(1, 3, 8, 8))
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(Autoencoder.from_pretrained(tmp_path / "model").encode_latents(images), latents)


@pytest.mark.parametrize("pixels", ["bernoulli", "logit-laplace"])
def test_decoders_of_likelihoods_give_pictures(pixels):
    model = tiny(pixels=pixels)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    output = model(images)
    assert output.output.shape == (2, 3 if pixels == "bernoulli" else 6, 16, 16)
    assert output.images.shape == images.shape
    torch.testing.assert_close(model.decode(model.encode(images)), output.images.clamp(-1, 1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_hierarchy_has_a_code_grid_half_as_fine():
    model = tiny(HierarchyConfig(codebook_size=32))
    assert model.factor == 4 and model.code_shape == (5, 4, 4)
    with pytest.raises(InputError, match="divisible by 4"):
        model.encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ValueError, match="divisible by the factor 4"):
        AutoencoderConfig.model_validate(
            model.config.model_dump() | {"image_size": 18},
        )
    top = model.decode_latents(model.bottleneck.lookup_top(model.encode(torch.rand(1, 3, 16, 16))))
    assert top.shape == (1, 3, 16, 16)


def test_a_prior_models_and_draws_the_codes_of_a_hierarchy(tiny_text_tokenizer):
    model = tiny(HierarchyConfig(codebook_size=32))
    prior = tiny_prior(model, tiny_text_tokenizer)
    codes = flatten_codes(model.encode(torch.rand(1, 3, 16, 16) * 2 - 1))
    logits = prior(prior.prefix(["a dog"]), codes)
    assert logits.shape == (1, 5 * 4 * 4, 32) and logits.isfinite().all()
    drawn = sample(prior, prior.prefix(["a dog"]), seeds=range(2))
    assert model.decode(unflatten_codes(drawn, model.code_shape)).shape == (2, 3, 16, 16)


@torch.no_grad()
def test_a_patchwise_encoder_gives_a_patch_the_same_codes_anywhere():
    model = tiny(ResidualConfig(codebook_size=32), encoder="patchwise", patch_size=2)
    assert model.factor == 4
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    codes = model.encode(images)
    assert torch.equal(model.encode(images.roll((4, -8), (2, 3))), codes.roll((1, -2), (2, 3)))
    changed = images.clone()
    changed[:, :, 5, 9] = -changed[:, :, 5, 9]
    z, moved = model.encoder(images), model.encoder(changed)
    assert ((z - moved).abs().amax(1)[0] > 0).nonzero().tolist() == [[1, 2]]


def test_saved_and_loaded_is_the_same_model(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    again = Autoencoder.from_pretrained(tmp_path / "model")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert not again.training and again.config == model.config and again.fingerprint == model.fingerprint
    assert torch.equal(again.decode(again.encode(images)), model.decode(model.encode(images)))


def test_sharded_weights_load_too(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "model", max_shard_size="10KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    assert Autoencoder.from_pretrained(tmp_path / "model").fingerprint == model.fingerprint


def drop(files, index):
    del files["decoder.conv_out.bias"]


def add(files, index):
    files["decoder.conv_out.other"] = torch.zeros(1)


def reshape(files, index):
    files["decoder.conv_out.bias"] = torch.zeros(2)


def point_elsewhere(files, index):
    index["weight_map"]["decoder.conv_out.bias"] = "../model.safetensors"


def point_at_a_pickle(files, index):
    index["weight_map"]["decoder.conv_out.bias"] = "model.bin"


def point_nowhere(files, index):
    index["weight_map"]["decoder.conv_out.bias"] = "model-9.safetensors"


def lose_the_map(files, index):
    del index["weight_map"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (drop, "the weight decoder.conv_out.bias is missing"),
        (add, "has the weight decoder.conv_out.other, which is not the model's"),
        (reshape, "size mismatch for decoder.conv_out.bias"),
        (point_elsewhere, "names ../model.safetensors, which is no safetensors file of the folder"),
        (point_at_a_pickle, "names model.bin, which is no safetensors file of the folder"),
        (point_nowhere, "model-9.safetensors"),
        (lose_the_map, "has no weight_map"),
    ],
)
def test_damaged_shards_are_refused_in_a_sentence(tmp_path, damage, reason):
    tiny().save_pretrained(tmp_path, max_shard_size="10KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = tmp_path / index["weight_map"]["decoder.conv_out.bias"]
    files = load_file(shard)
    damage(files, index)
    save_file(files, shard)
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=re.escape(f"the weights in {tmp_path} cannot be loaded: ")) as caught:
        Autoencoder.from_pretrained(tmp_path)
    assert reason in str(caught.value)


def test_the_fingerprint_is_of_the_codes_not_of_the_decoder():
    model = tiny()
    before = model.fingerprint
    with torch.no_grad():
        model.decoder.conv_out.weight += 1
        assert model.fingerprint == before
        model.bottleneck.codebook += 1
        assert model.fingerprint != before


@torch.no_grad()
@pytest.mark.parametrize("bottleneck", [GumbelConfig(codebook_size=32), FSQConfig(), HierarchyConfig(codebook_size=32)])
def test_the_fingerprint_is_of_projections_too_but_not_of_the_training(bottleneck):
    model = tiny(bottleneck)
    before = model.fingerprint
    for name, tensor in model.bottleneck.state_dict().items():
        changed = tensor.logical_not() if tensor.dtype == torch.bool else tensor + 1
        kept = tensor.clone()
        tensor.copy_(changed)
        training = name.split(".")[-1] in ("steps", "counts", "sums", "unused_steps", "started")
        assert (model.fingerprint == before) == training, name
        tensor.copy_(kept)


@pytest.mark.parametrize(
    "bottleneck", [VQConfig(codebook_size=32), VQEMAConfig(codebook_size=32), ResidualConfig(codebook_size=32)]
)
def test_fingerprints_stay_those_that_priors_were_trained_with(bottleneck):
    """Encoder and codebooks in the order of their names: what folders written by version 0.1 hold."""
    model = tiny(bottleneck)
    parts = [*model.encoder.state_dict().items()]
    parts += [(name, t) for name, t in model.bottleneck.state_dict().items() if name.endswith("codebook")]
    assert model.fingerprint == fingerprint(*(part for name, t in sorted(parts) for part in (name, t)))


def test_wrong_input_is_refused_with_its_shape():
    model = tiny()
    with pytest.raises(InputError, match=r"divisible by 2, got \(1, 3, 15, 16\)"):
        model.encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(InputError, match="codes must be in"):
        model.decode(torch.full((1, 1, 8, 8), 32))
    with pytest.raises(ValueError, match="divisible by the factor 4"):
        AutoencoderConfig(image_size=18, trunk=TrunkConfig(channels=32, multipliers=(1, 1, 1)))


@pytest.mark.parametrize(
    "trunk, message",
    [
        ({"channels": 48, "multipliers": (1, 2)}, r"norm_groups 32 must divide the widths \[48, 96\]"),
        ({"stem_channels": 48}, "norm_groups 32 must divide"),
        ({"decoder_multipliers": (1, 1)}, "must name 3 levels"),
        ({"decoder": "modulated", "patch_size": 2}, "needs patch_size 1"),
        ({"channels": 48, "norm_groups": 16, "decoder": "modulated"}, "widths divisible by 32"),
        ({"image_channels": 4, "encoder": "patchwise"}, "image_channels 4 needs a convolutional"),
        ({"image_channels": 4, "decoder": "modulated"}, "image_channels 4 needs a convolutional"),
        ({"encoder_attention": (3,)}, r"attention levels must be in \[0, 3\)"),
        ({"decoder_attention": (0, -1)}, r"attention levels must be in \[0, 3\)"),
    ],
)
def test_sizes_of_a_trunk_that_do_not_go_together_are_refused(trunk, message):
    fits = {"channels": 32, "multipliers": (1, 1, 2), "norm_groups": 32}
    TrunkConfig(**fits, encoder_attention=(0, 2), decoder_attention=(2,), stem_channels=64)
    with pytest.raises(ValueError, match=message):
        TrunkConfig(**{**fits, **trunk})


def test_weights_that_do_not_fit_are_refused(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cannot be loaded"):
        Autoencoder.from_pretrained(tmp_path / "model")
    path.unlink()
    with pytest.raises(InputError, match=r"no model.safetensors"):
        Autoencoder.from_pretrained(tmp_path / "model")
