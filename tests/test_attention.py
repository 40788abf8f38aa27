"""The parts of attention that have formulas of their own: the norm, against torch's in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.attention import EPS, rms_norm


def normed(function, x: Tensor, scale: Tensor, gradient: Tensor, rounding: bool = False) -> tuple[Tensor, ...]:
    """The result, and the gradients of x and of the scale."""
    x, scale = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(), scale.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=rounding):
        result = function(x, scale)
        return result.detach(), *torch.autograd.grad(result, (x, scale), gradient)


def reference(x: Tensor, scale: Tensor) -> Tensor:
    return F.rms_norm(x, scale.shape, scale, eps=EPS)


@pytest.mark.parametrize("layout", ["rows", "heads", "slice"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_norm_and_its_gradients_are_those_of_torch(layout: str, autocast: bool) -> None:
    torch.manual_seed(0)
    x = {
        "rows": torch.randn(7, 32),
        "heads": torch.randn(2, 5, 3, 32).transpose(1, 2),
        "slice": torch.randn(2, 5, 96)[..., 32:64],
    }[layout]
    x[..., 0, :] *= 1e-3  # a row so small that the epsilon counts
    scale, gradient = torch.rand(32) + 0.5, torch.randn(x.shape)
    found = normed(rms_norm, x, scale, gradient, autocast)
    wanted = normed(reference, x.double(), scale.double(), gradient.double())
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_in_bfloat16_the_norm_is_torchs_to_one_rounding() -> None:
    torch.manual_seed(0)
    x, scale, gradient = torch.randn(4, 3, 32).bfloat16(), torch.rand(32) + 0.5, torch.randn(4, 3, 32).bfloat16()
    found = normed(rms_norm, x, scale, gradient)
    wanted = normed(reference, x.double(), scale.double(), gradient.double())
    assert [part.dtype for part in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-7, atol=2**-8)
