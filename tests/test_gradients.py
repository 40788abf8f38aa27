"""Operations with gradients of their own, against torch's in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior import GPTConfig, GPTPrior
from stage2_prior.decoder import attend as plain_attend
from tessera.native import gradients
from tessera.native.accelerate import accelerate
from tessera.native.gradients import QUERIES, Linear, attend, causal_products, gelu_linear, linear

Operation = Callable[[Tensor, Tensor], Tensor]


def followed(operation: Operation, x: Tensor, weight: Tensor, gradient: Tensor, autocast: bool) -> list[Tensor]:
    """The result, and the gradients of x and of the weight, all under autocast if any is."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = operation(x, weight)
        return [result.detach(), *torch.autograd.grad(result, (x, weight), gradient.to(result.dtype))]


def compare(
    ours: Operation, torchs: Operation, x: Tensor, weight: Tensor, tolerance: float, autocast: bool = False
) -> list[Tensor]:
    gradient = torch.randn(torchs(x, weight).shape)
    found = followed(ours, x, weight, gradient, autocast)
    wanted = followed(torchs, x.double(), weight.double(), gradient.double(), False)
    for one, other in zip(found, wanted, strict=True):
        scale = float(other.abs().max())
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * scale)
    return found


EPS = 1e-6


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    return gradients.rms_norm(x, scale, EPS)


def norm_of_torch(x: Tensor, scale: Tensor) -> Tensor:
    return F.rms_norm(x, scale.shape, scale.to(x.dtype), eps=EPS)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", ["rows", "heads", "slice"])
def test_the_norm_and_its_gradients_are_those_of_torch(layout: str, autocast: bool) -> None:
    torch.manual_seed(0)
    x = {
        "rows": torch.randn(7, 32),
        "heads": torch.randn(2, 5, 3, 32).transpose(1, 2),
        "slice": torch.randn(2, 5, 96)[..., 32:64],
    }[layout]
    x[..., 0, :] *= 1e-4  # so small that the epsilon counts
    x[..., 1, :] = 0  # without a direction, and yet with a gradient
    found = compare(rms_norm, norm_of_torch, x, torch.rand(32) + 0.5, 1e-5, autocast)
    assert {part.dtype for part in found} == {torch.float32}


def test_in_float64_the_norm_keeps_its_precision() -> None:
    torch.manual_seed(0)
    compare(rms_norm, norm_of_torch, torch.randn(4, 32).double(), torch.rand(32).double(), 1e-12)


def test_in_bfloat16_the_norm_is_torch_s_to_one_rounding() -> None:
    torch.manual_seed(0)
    found = compare(rms_norm, norm_of_torch, torch.randn(4, 3, 32).bfloat16(), torch.rand(32) + 0.5, 2**-7)
    assert [part.dtype for part in found] == [torch.bfloat16, torch.bfloat16, torch.float32]


def layer(weight: Tensor) -> Linear:
    made = Linear(weight.shape[1], weight.shape[0], bias=False)
    del made.weight
    made.weight = weight
    return made


BY_ONEDNN = pytest.mark.parametrize(
    "large",
    [
        pytest.param(0, marks=pytest.mark.skipif(not gradients.ONEDNN, reason="multiplied by MKL without AVX-512")),
        1 << 60,
    ],
)


@BY_ONEDNN
@pytest.mark.parametrize("autocast", [False, True])
def test_a_linear_layer_is_that_of_torch(monkeypatch: pytest.MonkeyPatch, large: int, autocast: bool) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(gradients, "LARGE", large)
    for x in (
        torch.randn(2, 5, 24),
        torch.randn(2, 24, 5).transpose(1, 2),
        torch.randn(2, 9, 24)[:, 3:],
        torch.randn(3, 24),
    ):
        compare(linear, F.linear, x, torch.randn(16, 24), 2**-6 if autocast else 1e-5, autocast)


@pytest.mark.skipif(not gradients.ONEDNN, reason="multiplied by MKL without AVX-512")
def test_large_products_in_training_are_those_of_onednn() -> None:
    torch.manual_seed(0)
    x, made = torch.randn(1024, 512, requires_grad=True), Linear(512, 512, bias=False)
    with torch.profiler.profile() as trained:
        made(x).sum().backward()
    with torch.profiler.profile() as evaluated, torch.no_grad():
        made(x)
    counts = [{event.key: event.count for event in p.key_averages()} for p in (trained, evaluated)]
    assert counts[0]["mkldnn::_linear_pointwise"] == 2  # forward, and the gradient of x
    assert "mkldnn::_linear_pointwise" not in counts[1]


@BY_ONEDNN
def test_gelu_and_a_linear_layer_in_one_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, large: int) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(gradients, "LARGE", large)
    for x in (torch.randn(2, 5, 24), torch.randn(2, 24, 5).transpose(1, 2)):
        before = x.clone()
        compare(
            lambda x, weight: gelu_linear(x, layer(weight)), lambda x, weight: F.gelu(x) @ weight.T, x,
            torch.randn(16, 24), 1e-5,
        )  # fmt: skip
        torch.testing.assert_close(x, before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gelu_linear_under_autocast_rounds_as_autocast_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = Linear(24, 16, bias=False), torch.randn(3, 24, dtype=dtype)
    found = []
    for function in (gelu_linear, lambda x, layer: F.gelu(x) @ layer.weight.T):
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            result = function(own, layer)
        found.append(torch.autograd.grad(result.float().square().sum(), (own, layer.weight)))
    for ours, torchs in zip(*found, strict=True):
        assert ours.dtype == torchs.dtype
        torch.testing.assert_close(ours, torchs, rtol=2**-7, atol=2**-7 * float(torchs.abs().max()))


def test_a_layer_that_is_not_trained_gets_no_gradient_and_passes_one_on() -> None:
    torch.manual_seed(0)
    frozen, x = Linear(24, 16, bias=False).requires_grad_(False), torch.randn(3, 24, requires_grad=True)
    for ours, torchs in (
        (gelu_linear(x, frozen), F.gelu(x) @ frozen.weight.T),
        (frozen(x), x @ frozen.weight.T),
    ):
        (found,) = torch.autograd.grad(ours.square().sum(), x)
        (wanted,) = torch.autograd.grad(torchs.square().sum(), x)
        assert frozen.weight.grad is None
        torch.testing.assert_close(found, wanted)


def test_gelu_linear_leaves_what_is_no_plain_layer_to_itself() -> None:
    """An adapter in the layer's place, or a bias, is not passed over."""
    torch.manual_seed(0)
    x, linear = torch.randn(3, 24), nn.Linear(24, 16)
    for module in (linear, nn.Sequential(linear, nn.Tanh())):
        torch.testing.assert_close(gelu_linear(x, module), module(F.gelu(x)))


# Attention ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 7, QUERIES, 2 * QUERIES + 1])
def test_causal_products_are_attention_and_so_are_their_gradients(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 2, 3, length, 8, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(2, 3, length, 8, generator=generator, dtype=torch.float64)

    q, k, v = inputs.unbind()
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    expected = (q @ k.mT / math.sqrt(8)).masked_fill(future, -torch.inf).softmax(-1) @ v
    (slopes,) = torch.autograd.grad((expected * weight).sum(), inputs)
    mixed = causal_products(*inputs.unbind())
    (found,) = torch.autograd.grad((mixed * weight).sum(), inputs)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(found, slopes)


def test_attention_in_training_is_that_in_evaluation() -> None:
    q, k, v = torch.randn(3, 2, 3, 100, 16, generator=torch.Generator().manual_seed(0)).unbind()
    trained = attend(q.requires_grad_(), k, v, None)
    assert trained.grad_fn is not None
    with torch.no_grad():
        evaluated = attend(q, k, v, None)
    assert "CausalProducts" in str(trained.grad_fn.next_functions)
    torch.testing.assert_close(trained.detach(), evaluated, rtol=1e-5, atol=1e-6)


def test_bfloat16_attention_differs_by_rounding_only() -> None:
    q, k, v = torch.randn(3, 2, 3, 50, 16, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    exact = attend(q.double(), k.double(), v.double(), None)
    assert (attend(q, k, v, None) - exact).abs().max() < 0.02


# A whole model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_an_accelerated_prior_computes_what_the_plain_one_does(mlp: str, autocast: bool) -> None:
    torch.manual_seed(0)
    config = GPTConfig(
        codebook_size=16, code_shape=(1, 4, 4), text_vocab_size=20, text_length=5, dim=32, depth=2, num_heads=2, mlp=mlp
    )
    prior = GPTPrior(config)
    with torch.no_grad():
        for weight in prior.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    prefix, codes = prior.pad([[3, 4], [5]]), torch.randint(16, (2, 16))
    results = []
    for accelerated in (False, True):
        if accelerated:
            names = [*prior.state_dict()]
            accelerate(prior)
            assert [*prior.state_dict()] == names
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = prior(prefix, codes)
        prior.zero_grad()
        logits.float().square().mean().backward()
        results.append([logits.detach().float(), *(weight.grad for weight in prior.parameters())])
    block: Any = prior.decoder.blocks[0]
    assert block.attention.attend is attend and attend is not plain_attend
    for plain, fast in zip(*results, strict=True):
        if plain is None:  # of the text's embedding rows nothing else
            assert fast is None
            continue
        tolerance = 0.03 if autocast else 1e-5
        torch.testing.assert_close(fast, plain, rtol=tolerance, atol=tolerance * float(plain.abs().max()))
