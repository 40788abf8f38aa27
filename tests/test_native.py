"""What `accelerate_training` swaps in computes what the plain modules do, gradients too."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior import GPTConfig, GPTPrior
from stage2_prior.decoder import Attention
from tessera.native import accelerate_training, linear
from tessera.native.attention import MAX_LENGTH, causal_attention, causal_products
from tessera.native.linear import OneDNNLinear
from tessera.native.norm import LeanRMSNorm, rms_norm

AVX512 = pytest.mark.skipif(not linear.multiplies_by_onednn(), reason="oneDNN gains with AVX-512 only")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products go to oneDNN too."""
    monkeypatch.setattr(linear, "MIN_MULTIPLICATIONS", 0)


# Linear layers -------------------------------------------------------------------------------------------------------


def by_onednn(work: nn.Module, x: Tensor) -> int:
    """Products by oneDNN in a forward and backward pass, or in a forward pass where gradients are off."""
    with torch.profiler.profile() as profile:
        result = work(x)
        if result.requires_grad:
            result.sum().backward()
    return {event.key: event.count for event in profile.key_averages()}.get("mkldnn::_linear_pointwise", 0)


@AVX512
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ["rows", "sequences", "transposed", "slice"])
def test_a_linear_layer_and_its_gradients_are_those_of_torch(small: None, bias: bool, layout: str) -> None:
    torch.manual_seed(0)
    x = {
        "rows": torch.randn(3, 24),
        "sequences": torch.randn(2, 5, 24),
        "transposed": torch.randn(2, 24, 5).transpose(1, 2),
        "slice": torch.randn(2, 9, 24)[:, 3:],
    }[layout]
    layer = OneDNNLinear(24, 16, bias=bias)
    inputs = (x.requires_grad_(), *layer.parameters())
    result, weight = layer(x), torch.randn(*x.shape[:-1], 16)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad((result * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@AVX512
def test_large_float32_matrices_are_multiplied_by_onednn_in_training_alone() -> None:
    layer, x = OneDNNLinear(512, 512), torch.randn(1024, 512, requires_grad=True)
    assert by_onednn(layer, x) == 3  # forward, and the gradients of x and of the weight
    assert by_onednn(layer, x[:16]) == 0
    with torch.no_grad():
        assert by_onednn(layer, x) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@AVX512
def test_a_layer_that_is_not_trained_gets_no_gradient_and_passes_one_on(small: None) -> None:
    frozen, x = OneDNNLinear(24, 16).requires_grad_(False), torch.randn(3, 24, requires_grad=True)
    (found,) = torch.autograd.grad(frozen(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(F.linear(x, frozen.weight, frozen.bias).square().sum(), x)
    torch.testing.assert_close(found, wanted)
    assert frozen.weight.grad is None


# Norms ---------------------------------------------------------------------------------------------------------------

EPS = 1e-6


def compare_norms(x: Tensor, scale: Tensor, tolerance: float, autocast: bool = False) -> None:
    """The norm and its gradients beside torch's in float64."""
    gradient = torch.randn(x.shape)
    x, scale = x.detach().requires_grad_(), scale.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        normed = rms_norm(x, scale, EPS)
        found = [normed, *torch.autograd.grad(normed, (x, scale), gradient.to(normed.dtype))]
    exact, exact_scale = (part.detach().double().requires_grad_() for part in (x, scale))
    expected = F.rms_norm(exact, exact_scale.shape, exact_scale, eps=EPS)
    wanted = [expected, *torch.autograd.grad(expected, (exact, exact_scale), gradient.double())]
    assert [part.dtype for part in found] == [x.dtype, x.dtype, scale.dtype]
    for ours, theirs in zip(found, wanted, strict=True):
        atol = tolerance * float(theirs.detach().abs().max())
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", ["rows", "heads", "slice"])
def test_a_norm_and_its_gradients_are_those_of_torch(layout: str, autocast: bool) -> None:
    torch.manual_seed(0)
    x = {
        "rows": torch.randn(7, 32),
        "heads": torch.randn(2, 5, 3, 32).transpose(1, 2),
        "slice": torch.randn(2, 5, 96)[..., 32:64],
    }[layout]
    x[..., 0, :] *= 1e-4  # so small that the epsilon counts
    x[..., 1, :] = 0  # without a direction, and yet with a gradient
    compare_norms(x, torch.rand(32) + 0.5, 1e-5, autocast)


def test_a_norm_keeps_the_precision_of_its_input() -> None:
    torch.manual_seed(0)
    compare_norms(torch.randn(4, 32).double(), torch.rand(32).double(), 1e-12)
    compare_norms(torch.randn(4, 3, 32).bfloat16(), torch.rand(32) + 0.5, 2**-7)


def test_norms_without_a_scale_stay() -> None:
    others = nn.Sequential(nn.RMSNorm(8, elementwise_affine=False), nn.RMSNorm((4, 8)), nn.LayerNorm(8))
    assert accelerate_training(others) == []


# Attention -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 7, 100])
def test_causal_products_are_attention_and_so_are_their_gradients(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 2, 3, length, 8, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(2, 3, length, 8, generator=generator, dtype=torch.float64)
    q, k, v = inputs.unbind()
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    expected = (q @ k.mT / math.sqrt(8)).masked_fill(future, -torch.inf).softmax(-1) @ v
    (wanted,) = torch.autograd.grad((expected * weight).sum(), inputs)
    mixed = causal_products(*inputs.unbind())
    (found,) = torch.autograd.grad((mixed * weight).sum(), inputs)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(found, wanted)


def test_bfloat16_attention_differs_by_rounding_only() -> None:
    q, k, v = torch.randn(3, 2, 3, 50, 16, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert (causal_attention(q, k, v, None) - exact).abs().max() < 0.02


def test_other_attention_is_torch_s() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 6, 8).bfloat16().unbind()
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    sdpa = F.scaled_dot_product_attention
    assert torch.equal(causal_attention(q, k, v, mask), sdpa(q, k, v, attn_mask=mask))
    assert torch.equal(causal_attention(q[:, :, :1], k, v, None), sdpa(q[:, :, :1], k, v))
    shared = causal_attention(q, k[:, :2], v[:, :2], None)
    assert torch.equal(shared, sdpa(q, k[:, :2], v[:, :2], is_causal=True, enable_gqa=True))
    long = torch.randn(1, 1, MAX_LENGTH + 1, 8).bfloat16()
    for exact in (q.float(), long):
        assert torch.equal(causal_attention(exact, exact, exact, None), sdpa(exact, exact, exact, is_causal=True))
    with torch.no_grad():
        assert torch.equal(causal_attention(q, k, v, None), sdpa(q, k, v, is_causal=True))


# A whole model -------------------------------------------------------------------------------------------------------


def make_prior(mlp: str = "gelu") -> GPTPrior:
    torch.manual_seed(0)
    config = GPTConfig(
        codebook_size=16, code_shape=(1, 4, 4), text_vocab_size=20, text_length=5, dim=32, depth=2, num_heads=2, mlp=mlp
    )
    prior = GPTPrior(config)
    with torch.no_grad():
        for weight in prior.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return prior


def trained(prior: GPTPrior, autocast: bool) -> list[Tensor | None]:
    """Logits and the gradients of all parameters."""
    prefix, codes = prior.pad([[3, 4], [5]]), torch.arange(32).view(2, 16) % 16
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = prior(prefix, codes)
    prior.zero_grad()
    logits.float().square().mean().backward()
    return [logits.detach().float(), *(weight.grad for weight in prior.parameters())]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_an_accelerated_prior_computes_what_the_plain_one_does(small: None, mlp: str, autocast: bool) -> None:
    prior = make_prior(mlp)
    plain = trained(prior, autocast)
    parameters, names = list(prior.parameters()), [*prior.state_dict()]
    swapped = accelerate_training(prior)
    assert "decoder.blocks.1.attention" in swapped
    assert ("decoder.blocks.0.mlp_in" in swapped) == linear.multiplies_by_onednn()
    assert [*prior.state_dict()] == names
    assert all(one is other for one, other in zip(prior.parameters(), parameters, strict=True))
    tolerance = 0.03 if autocast else 1e-5
    for model in (prior, copy.deepcopy(prior)):
        for ours, theirs in zip(trained(model, autocast), plain, strict=True):
            if theirs is None:  # of the text's logits, which `forward` does not compute
                assert ours is None
                continue
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


def test_without_avx512_linear_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    prior = make_prior()
    swapped = accelerate_training(prior)
    assert {type(prior.get_submodule(name)) for name in swapped} == {LeanRMSNorm, Attention}
    assert not any(isinstance(module, OneDNNLinear) for module in prior.modules())


def test_on_another_device_all_stays() -> None:
    assert accelerate_training(make_prior().to("meta")) == []
