"""The decoder's convolutions: Winograd's give what the plain convolution gives."""

import pytest
import torch
import torch.nn.functional as F

from stage1_tokenizer import Autoencoder, AutoencoderConfig
from stage1_tokenizer.winograd import FEWEST_PIXELS, WinogradConv2d, _sums, convolve, convolve_bfloat16
from tessera.hardware import cpu_multiplies_bfloat16
from tessera.native import build as native


@pytest.fixture
def sums():
    found = _sums()
    if found is None:
        pytest.skip("there is no C++ compiler")
    return found


def in_float64(conv, x):
    return F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)


@pytest.mark.parametrize("shape", [(2, 3, 5, 4, 8), (1, 7, 3, 40, 12), (3, 16, 16, 64, 64)])
def test_it_is_the_convolution(shape, sums, monkeypatch):
    monkeypatch.setattr("stage1_tokenizer.winograd.BLOCKS", 45)  # in parts of several sizes
    batch, channels, wide, height, width = shape
    x, conv = torch.randn(batch, channels, height, width), WinogradConv2d(channels, wide)
    with torch.no_grad():
        found = convolve(sums, x, conv)
        torch.testing.assert_close(found.double(), in_float64(conv, x), rtol=0, atol=1e-4)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(convolve(sums, x[:1], conv), found[:1])  # the same alone as in company


@pytest.mark.skipif(not cpu_multiplies_bfloat16(), reason="this processor does not multiply in bfloat16")
@torch.no_grad()
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 16, 16, 4, 6), (1, 32, 96, 34, 18), (2, 64, 128, 32, 16)])
def test_in_bfloat16_it_is_about_as_near_as_the_plain_convolution(shape, weights, sums):
    torch.manual_seed(0)
    batch, channels, wide, height, width = shape
    x = F.silu(torch.randn(batch, channels, height, width)).bfloat16()
    conv = WinogradConv2d(channels, wide)
    expected = in_float64(conv, x)
    plain = F.conv2d(x, conv.weight.bfloat16(), conv.bias.bfloat16(), padding=1)
    whole = conv.to(weights)._whole()
    found = convolve_bfloat16(whole, x, conv)
    assert found.dtype == torch.bfloat16 and found.is_contiguous(memory_format=torch.channels_last)
    off, plainly_off = ((y.double() - expected).square().mean().sqrt() for y in (found, plain))
    assert off < 3 * plainly_off and off < 0.006 * expected.std()
    assert torch.equal(convolve_bfloat16(whole, x[:1], conv), found[:1])


@pytest.mark.skipif(not cpu_multiplies_bfloat16(), reason="this processor does not multiply in bfloat16")
@torch.no_grad()
def test_in_bfloat16_all_but_whole_vectors_of_channels_is_the_plain_convolution(sums):
    x = torch.randn(1, 24, 64, 64, dtype=torch.bfloat16)
    conv = WinogradConv2d(24, 16).bfloat16()
    assert conv._whole() is None and torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1))


@pytest.mark.parametrize("size", [(64, 64), (62, 72), (16, 16)])
def test_where_it_does_not_gain_the_plain_convolution_stays(size, monkeypatch, sums):
    conv, x = WinogradConv2d(4, 4), torch.randn(1, 4, *size)
    plain = F.conv2d(x, conv.weight, conv.bias, padding=1)
    calls = []
    monkeypatch.setattr(
        "stage1_tokenizer.winograd.convolve", lambda *arguments: calls.append(1) or convolve(*arguments)
    )
    with torch.no_grad():
        torch.testing.assert_close(conv(x), plain, rtol=0, atol=1e-4)
    assert bool(calls) == (size == (64, 64))
    calls.clear()
    assert torch.equal(conv(x), plain) and not calls  # a gradient is wanted
    calls.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16 and not calls


@torch.no_grad()
def test_a_decoder_gives_the_same_picture_and_an_encoder_never_uses_it(monkeypatch, sums):
    torch.manual_seed(0)
    trunk = {"channels": 32, "multipliers": [1, 1, 2], "latent_dim": 8, "norm_groups": 8}
    model = Autoencoder(
        AutoencoderConfig.model_validate({"image_size": 128, "trunk": trunk, "bottleneck": {"type": "fsq"}})
    )
    model.eval()
    assert not any(isinstance(part, WinogradConv2d) for part in model.encoder.modules())
    codes = model.encode(torch.rand(1, 3, 128, 128) * 2 - 1)
    found = model.decode(codes)
    monkeypatch.setitem(FEWEST_PIXELS, torch.float32, 10**9)
    plain = model.decode(codes)
    assert not torch.equal(found, plain)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)


def test_without_a_compiler_it_works_and_says_why(monkeypatch, tmp_path, capsys):
    conv, x = WinogradConv2d(4, 4), torch.randn(1, 4, 64, 64)
    plain = F.conv2d(x, conv.weight, conv.bias, padding=1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    for cached in (_sums, native._library):
        cached.cache_clear()
    with torch.no_grad():
        assert torch.equal(conv(x), plain) and torch.equal(conv(x), plain)
    assert capsys.readouterr().err.count("plain convolutions, which are slower: false cannot build") == 1
    for cached in (_sums, native._library):
        cached.cache_clear()
