"""The decoder's convolutions: Winograd's give what the plain convolution gives."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stage1_tokenizer import Autoencoder, AutoencoderConfig
from tessera.hardware import cpu_multiplies_bfloat16
from tessera.native import accelerate, build, winograd
from tessera.native.winograd import WinogradConv2d, _float32_library, convolve, convolve_bfloat16

BFLOAT16 = pytest.mark.skipif(not cpu_multiplies_bfloat16(), reason="this processor does not multiply in bfloat16")


@pytest.fixture
def library():
    found = _float32_library()
    if found is None:
        pytest.skip("there is no C++ compiler")
    return found


def convolution(width_in, width):
    return WinogradConv2d(width_in, width, 3, padding=1)


def in_float64(conv, x):
    return F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4, 8), (1, 7, 3, 40, 12), (3, 16, 16, 64, 64)])
@torch.no_grad()
def test_it_is_the_convolution(shape, onednn, library, monkeypatch):
    if onednn and not winograd.multiplies_by_onednn():
        pytest.skip("there is no AVX-512")
    monkeypatch.setattr(winograd, "multiplies_by_onednn", lambda: onednn)
    monkeypatch.setattr(winograd, "BLOCKS", 45)  # in parts of several sizes
    batch, channels, width_out, height, width = shape
    x, conv = torch.randn(batch, channels, height, width), convolution(channels, width_out)
    found = convolve(library, x, conv)
    torch.testing.assert_close(found.double(), in_float64(conv, x), rtol=0, atol=1e-4)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(convolve(library, x[:1], conv), found[:1])  # the same alone as in a batch


@BFLOAT16
@torch.no_grad()
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 16, 16, 4, 6), (1, 32, 96, 34, 18), (2, 64, 128, 32, 16)])
def test_in_bfloat16_it_is_about_as_near_as_the_plain_convolution(shape, weights, library):
    torch.manual_seed(0)
    batch, channels, width_out, height, width = shape
    x = F.silu(torch.randn(batch, channels, height, width)).bfloat16()
    conv = convolution(channels, width_out)
    expected = in_float64(conv, x)
    plain = F.conv2d(x, conv.weight.bfloat16(), conv.bias.bfloat16(), padding=1)
    compiled = conv.to(weights)._bfloat16_library()
    found = convolve_bfloat16(compiled, x, conv)
    assert found.dtype == torch.bfloat16 and found.is_contiguous(memory_format=torch.channels_last)
    error, plain_error = ((y.double() - expected).square().mean().sqrt() for y in (found, plain))
    assert error < 3 * plain_error and error < 0.006 * expected.std()
    assert torch.equal(convolve_bfloat16(compiled, x[:1], conv), found[:1])


@BFLOAT16
@torch.no_grad()
def test_in_bfloat16_all_but_whole_vectors_of_channels_is_the_plain_convolution(library):
    x = torch.randn(1, 24, 64, 64, dtype=torch.bfloat16)
    conv = convolution(24, 16).bfloat16()
    assert conv._bfloat16_library() is None and torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1))


@pytest.mark.parametrize("size", [(64, 64), (62, 72), (16, 16)])
def test_where_it_does_not_gain_the_plain_convolution_stays(size, monkeypatch, library):
    conv, x = convolution(4, 4), torch.randn(1, 4, *size)
    plain = F.conv2d(x, conv.weight, conv.bias, padding=1)
    calls = []
    monkeypatch.setattr(winograd, "convolve", lambda *arguments: calls.append(1) or convolve(*arguments))
    with torch.no_grad():
        torch.testing.assert_close(conv(x), plain, rtol=0, atol=1e-4)
    assert bool(calls) == (size == (64, 64))
    calls.clear()
    assert torch.equal(conv(x), plain) and not calls  # a gradient is wanted
    calls.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16 and not calls


def tokenizer():
    torch.manual_seed(0)
    trunk = {"channels": 64, "multipliers": [1, 1, 2], "latent_dim": 8, "norm_groups": 8}
    config = {"image_size": 128, "trunk": trunk, "bottleneck": {"type": "fsq"}}
    return Autoencoder(AutoencoderConfig.model_validate(config)).eval()


def swapped(model):
    return [name for name, module in model.named_modules() if type(module) is WinogradConv2d]


@torch.no_grad()
def test_a_loaded_decoder_gives_the_same_image_and_an_encoder_never_uses_it(tmp_path, library):
    plain = tokenizer()
    plain.save_pretrained(tmp_path / "tokenizer")
    model = Autoencoder.from_pretrained(tmp_path / "tokenizer")
    assert not swapped(plain) and swapped(model) and not swapped(model.encoder)
    assert model.fingerprint == plain.fingerprint
    images = torch.rand(1, 3, 128, 128) * 2 - 1
    codes = model.encode(images)
    assert torch.equal(codes, plain.encode(images))
    found, expected = model.decode(codes), plain.decode(codes)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_accelerate_leaves_parameters_names_and_gradients_as_they_are(library):
    plain, model = tokenizer().decoder, tokenizer().decoder
    parameters = dict(model.named_parameters())
    names = accelerate(model)
    assert names == swapped(model) and accelerate(model) == []
    assert all(model.get_submodule(name).kernel_size == (3, 3) for name in names)
    assert type(model.conv_out) is nn.Conv2d  # three channels gain nothing
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert swapped(copy.deepcopy(model)) == names
    latents = torch.randn(1, 8, 32, 32)
    for one in (plain, model):
        one(latents).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    plain.load_state_dict(model.state_dict())


def test_other_convolutions_stay():
    others = nn.Sequential(
        nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3, padding=1, stride=2),
        nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.Conv2d(64, 64, 3, padding=1, groups=2),
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"), nn.Conv2d(64, 64, 3, padding="same"),
        nn.Conv2d(64, 64, 3, padding=2, dilation=2), nn.Conv2d(32, 64, 3, padding=1),
    )  # fmt: skip
    assert accelerate(others) == []


def test_without_a_compiler_it_works_and_says_why(monkeypatch, tmp_path, capsys):
    conv, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 64, 64)
    plain = F.conv2d(x, conv.weight, conv.bias, padding=1)
    accelerate(conv)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    for cached in (_float32_library, build._library):
        cached.cache_clear()
    with torch.no_grad():
        assert torch.equal(conv(x), plain) and torch.equal(conv(x), plain)
    assert capsys.readouterr().err.count("plain convolutions, which are slower: false cannot build") == 1
    for cached in (_float32_library, build._library):
        cached.cache_clear()
