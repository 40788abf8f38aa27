"""Tile by tile equals the whole: every trunk, sizes that tiles do not divide, and less memory."""

import subprocess
import sys

import pytest
import torch

from stage1_tokenizer import Autoencoder, AutoencoderConfig
from stage1_tokenizer.bottlenecks.codebook import nearest
from stage1_tokenizer.tiling import decode_tiles, encode_tiles
from tessera.errors import InputError

SIZES = {"channels": 16, "encoder_blocks": 2, "decoder_blocks": 2, "latent_dim": 8, "norm_groups": 8}
TRUNKS = {
    "vqgan": {"multipliers": [1, 1, 2, 2], "code_dim": 4},
    "folded": {"multipliers": [1, 2], "patch_size": 4},
    "one level": {"multipliers": [1], "patch_size": 4},
    "no attention": {"multipliers": [1, 1, 2], "attention": False},
    "attention inside": {"multipliers": [1, 1, 1, 2], "encoder_attention": [2], "decoder_attention": [2]},
    "modulated": {"multipliers": [1, 2, 2], "decoder": "modulated", "channels": 32},
    "patchwise": {"multipliers": [1, 2], "encoder": "patchwise", "patch_size": 2},
    "dvae": {"type": "dvae", "channels": 16, "multipliers": [1, 2, 2], "decoder_channels": 8, "latent_dim": 8},
}


def built(trunk, pixels="values"):
    torch.manual_seed(0)
    sizes = {} if trunk.get("type") == "dvae" else SIZES
    bottleneck = {"type": "vq-ema", "codebook_size": 64}
    config = {"image_size": 64, "trunk": sizes | trunk, "bottleneck": bottleneck, "pixels": pixels}
    model = Autoencoder(AutoencoderConfig.model_validate(config))
    with torch.no_grad():
        for parameter in model.parameters():  # no bias is 0 and no norm without weight, or mistakes with them pass
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model(torch.rand(2, 3, 64, 64) * 2 - 1)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("trunk", TRUNKS.values(), ids=TRUNKS)
@pytest.mark.parametrize("tile", [9, 24])
def test_tiles_equal_the_whole(trunk, tile):
    model = built(trunk)
    images = torch.rand(2, 3, 40, 56).cumsum(3).sin()  # nothing is alike anywhere: each tile has other statistics
    images[:, :, 24:] *= torch.rand(2, 3, 16, 56)
    z = model.encoder(images)
    torch.testing.assert_close(encode_tiles(model.encoder, images, tile), z, rtol=1e-4, atol=1e-4 * float(z.std()))
    codes = model.encode(images)
    assert (model.encode(images, tile=tile) == codes).float().mean() > 0.99  # but for ties within rounding
    latents = model.bottleneck.lookup(codes)
    pixels = model.decoder(latents)
    torch.testing.assert_close(
        decode_tiles(model.decoder, latents, tile), pixels, rtol=1e-4, atol=1e-4 * float(pixels.std())
    )
    torch.testing.assert_close(model.decode(codes, tile=tile), model.decode(codes), rtol=0, atol=1e-4)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_one_tile_is_the_whole_bit_for_bit():
    model = built(TRUNKS["vqgan"])
    images = torch.rand(1, 3, 64, 32)
    assert torch.equal(model.encode_latents(images, tile=64), model.encode_latents(images))
    codes = model.encode(images)
    assert torch.equal(model.decode(codes, tile=64), model.decode(codes))


@torch.no_grad()
def test_likelihoods_are_decoded_by_tiles_too():
    model = built(TRUNKS["dvae"], pixels="logit-laplace")
    codes = torch.randint(64, (1, 1, 20, 30))
    torch.testing.assert_close(model.decode(codes, tile=9), model.decode(codes), rtol=0, atol=1e-5)


def test_a_tile_of_nothing_is_refused():
    with pytest.raises(InputError, match="tile must be at least 1, got 0"):
        built(TRUNKS["folded"]).encode(torch.zeros(1, 3, 16, 16), tile=0)


def test_the_nearest_code_is_the_same_in_parts(monkeypatch):
    vectors, codebook = torch.randn(100, 4), torch.randn(16, 4)
    expected = torch.cdist(vectors, codebook).argmin(1)
    for most in (1, 16 * 7, 10**6):
        monkeypatch.setattr("stage1_tokenizer.bottlenecks.codebook.MOST_DISTANCES", most)
        assert torch.equal(nearest(vectors, codebook), expected)


PEAK = """
import sys, torch
torch.set_num_threads(1)
from stage1_tokenizer import Autoencoder, AutoencoderConfig
trunk = {"channels": 32, "multipliers": [1, 1, 1, 1], "encoder_blocks": 1, "decoder_blocks": 1, "latent_dim": 4,
         "attention": False}
model = Autoencoder(AutoencoderConfig(image_size=64, trunk=trunk, bottleneck={"type": "fsq"})).eval()
model.decode(model.encode(torch.zeros(1, 3, 64, 64)))
def peak():  # in KiB; ru_maxrss would be that of the process which started this one
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
tile = int(sys.argv[1]) or None
model.decode(model.encode(torch.zeros(1, 3, 768, 768), tile=tile), tile=tile)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_tiles_take_less_memory():
    peaks = {
        tile: int(subprocess.run([sys.executable, "-c", PEAK, str(tile)], capture_output=True, check=True).stdout)
        for tile in (0, 128)
    }
    assert peaks[128] < peaks[0] * 3 / 4, peaks  # a half; what the allocator keeps differs from run to run


@torch.no_grad()
@pytest.mark.parametrize("norm_groups", [8, 16])
def test_the_smallest_tile_is_one_position(norm_groups):
    """And with a group for each channel a tile has one number of it."""
    model = built(TRUNKS["no attention"] | {"multipliers": [1, 1, 1], "norm_groups": norm_groups})
    codes = torch.randint(64, (1, 1, 3, 2))
    torch.testing.assert_close(model.decode(codes, tile=1), model.decode(codes), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("trunk", ["no attention", "modulated", "dvae"])
def test_no_piece_is_larger_than_a_tile_and_what_it_sees(trunk):
    """By the inputs of the convolutions; the field of view of a decoder's level is under 16 a side."""
    model, sides = built(TRUNKS[trunk]), []
    latents = torch.randn(1, 8, 64, 64)
    for module in model.decoder.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size[0] > 1:
            module.register_forward_pre_hook(lambda module, given: sides.append(max(given[0].shape[2:])))
    decode_tiles(model.decoder, latents, 16)
    assert max(sides) < 100  # of 256; attention in the middle reads the latents whole, 64
