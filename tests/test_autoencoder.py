import pytest
import torch

from common.errors import InputError
from stage1_tokenizer import Autoencoder, AutoencoderConfig
from stage1_tokenizer.bottlenecks import BottleneckConfig, ResidualConfig, VQConfig, VQEMAConfig
from stage1_tokenizer.convolutions import TrunkConfig


def tiny(bottleneck: BottleneckConfig | None = None, **trunk) -> Autoencoder:
    torch.manual_seed(0)
    sizes = dict(channels=8, multipliers=(1, 2), encoder_blocks=1, decoder_blocks=1, latent_dim=4, norm_groups=4)
    config = AutoencoderConfig(
        image_size=16, trunk=TrunkConfig(**{**sizes, **trunk}), bottleneck=bottleneck or VQEMAConfig(codebook_size=32)
    )
    model = Autoencoder(config)
    model(torch.rand(2, 3, 16, 16) * 2 - 1)  # starts the codebook
    return model.eval()


@pytest.mark.parametrize(
    "bottleneck", [VQConfig(codebook_size=32), VQEMAConfig(codebook_size=32), ResidualConfig(codebook_size=32)]
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


def test_the_fingerprint_is_of_the_codes_not_of_the_decoder():
    model = tiny()
    before = model.fingerprint
    with torch.no_grad():
        model.decoder.conv_out.weight += 1
        assert model.fingerprint == before
        model.bottleneck.codebook += 1
        assert model.fingerprint != before


def test_wrong_input_is_refused_with_its_shape():
    model = tiny()
    with pytest.raises(InputError, match=r"divisible by 2, got \(1, 3, 15, 16\)"):
        model.encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(InputError, match="codes must be in"):
        model.decode(torch.full((1, 1, 8, 8), 32))
    with pytest.raises(ValueError, match="divisible by the factor 4"):
        AutoencoderConfig(image_size=18, trunk=TrunkConfig(channels=32, multipliers=(1, 1, 1)))


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
