"""Operations with gradients of their own, against torch's in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior import fused
from stage2_prior.fused import EPS, Linear, gelu_linear, linear, rms_norm

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
    made = Linear(weight.shape[1], weight.shape[0])
    del made.weight
    made.weight = weight
    return made


BY_ONEDNN = pytest.mark.parametrize(
    "large",
    [
        pytest.param(0, marks=pytest.mark.skipif(not fused.ONEDNN, reason="multiplied by MKL without AVX-512")),
        1 << 60,
    ],
)


@BY_ONEDNN
@pytest.mark.parametrize("autocast", [False, True])
def test_a_linear_layer_is_that_of_torch(monkeypatch: pytest.MonkeyPatch, large: int, autocast: bool) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(fused, "LARGE", large)
    for x in (
        torch.randn(2, 5, 24),
        torch.randn(2, 24, 5).transpose(1, 2),
        torch.randn(2, 9, 24)[:, 3:],
        torch.randn(3, 24),
    ):
        compare(linear, F.linear, x, torch.randn(16, 24), 2**-6 if autocast else 1e-5, autocast)


@pytest.mark.skipif(not fused.ONEDNN, reason="multiplied by MKL without AVX-512")
def test_large_products_in_training_are_those_of_onednn() -> None:
    torch.manual_seed(0)
    x, made = torch.randn(1024, 512, requires_grad=True), Linear(512, 512)
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
    monkeypatch.setattr(fused, "LARGE", large)
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
    layer, x = Linear(24, 16), torch.randn(3, 24, dtype=dtype)
    gradients = []
    for function in (gelu_linear, lambda x, layer: F.gelu(x) @ layer.weight.T):
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            result = function(own, layer)
        gradients.append(torch.autograd.grad(result.float().square().sum(), (own, layer.weight)))
    for ours, torchs in zip(*gradients, strict=True):
        assert ours.dtype == torchs.dtype
        torch.testing.assert_close(ours, torchs, rtol=2**-7, atol=2**-7 * float(torchs.abs().max()))


def test_a_layer_that_is_not_trained_gets_no_gradient_and_passes_one_on() -> None:
    torch.manual_seed(0)
    frozen, x = Linear(24, 16).requires_grad_(False), torch.randn(3, 24, requires_grad=True)
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
