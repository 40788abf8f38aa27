import copy

import pytest
import torch

from tessera.hardware import multiplies_bfloat16
from tessera.training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(6, 6), (5, 12), (12, 5)])
def test_singular_values_come_to_one_and_singular_vectors_stay(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ orthogonal(matrices) @ vh.mT  # diagonal, in the singular vectors of the input
    values = inner.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(inner, torch.diag_embed(values), rtol=0, atol=1e-4)


def test_steps_are_those_of_the_papers():
    """One matrix at a time, in float64: momentum, its singular values by five iterations, AdamW's scale and decay."""
    torch.manual_seed(0)
    start, gradients = torch.randn(2, 8, 20), torch.randn(5, 2, 8, 20)
    ours = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    optimizer = Muon(ours, lr=0.1, weight_decay=0.3)
    expected, momenta = start.double(), torch.zeros(2, 8, 20, dtype=torch.float64)
    for pair in gradients:
        for parameter, gradient in zip(ours, pair, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        momenta = 0.95 * momenta + 0.05 * pair.double()
        for i, direction in enumerate(0.05 * pair.double() + 0.95 * momenta):
            x = direction / direction.norm()
            for _ in range(5):
                x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
            expected[i] = expected[i] * (1 - 0.1 * 0.3) - 0.1 * 0.2 * 20**0.5 * x
    torch.testing.assert_close(torch.stack([*ours]).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it from 2.9 on; the test above is of the paper")
def test_steps_equal_torchs_own_muon_to_its_precision():
    torch.manual_seed(0)
    start, gradients = torch.randn(2, 8, 20), torch.randn(5, 2, 8, 20)
    ours = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    theirs = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    optimizers = [
        Muon(ours, lr=0.1, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),  # bfloat16
    ]
    for pair in gradients:
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for parameter, gradient in zip(parameters, pair, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    for mine, other, first in zip(ours, theirs, start, strict=True):
        assert (mine - other).abs().max() < 0.03 * (mine - first).abs().max()


def test_state_loads_into_a_new_optimizer():
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(4, 6))
    optimizer = Muon([matrix], lr=0.1)
    matrix.grad = torch.randn(4, 6)
    optimizer.step()
    again = torch.nn.Parameter(matrix.detach().clone())
    resumed = Muon([again], lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    matrix.grad = again.grad = torch.randn(4, 6)
    optimizer.step()
    resumed.step()
    assert torch.equal(matrix, again)


def test_checkpoints_of_torchs_own_muon_go_on_with_their_momentum():
    torch.manual_seed(0)
    start, gradients = torch.randn(4, 6), torch.randn(2, 4, 6)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    first = Muon([ours], lr=0.1)
    group = {
        "lr": 0.1, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "ns_coefficients": (3.4445, -4.775, 2.0315),
        "eps": 1e-07, "ns_steps": 5, "adjust_lr_fn": "match_rms_adamw", "params": [0],
    }  # fmt: skip
    written = {"state": {0: {"momentum_buffer": 0.05 * gradients[0]}}, "param_groups": [group]}
    if hasattr(torch.optim, "Muon"):
        other = torch.optim.Muon([theirs], lr=0.1, adjust_lr_fn="match_rms_adamw")
        theirs.grad = gradients[0].clone()
        other.step()
        assert other.state_dict()["param_groups"] == written["param_groups"]
        torch.testing.assert_close(other.state_dict()["state"], written["state"])
    first.load_state_dict(copy.deepcopy(written))
    before = first.state[ours]["momentum_buffer"].clone()
    ours.grad = gradients[1].clone()
    first.step()
    torch.testing.assert_close(first.state[ours]["momentum_buffer"], before.lerp(gradients[1], 0.05))


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False}, False),
        ({"avx2": True, "avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
    ],
)
def test_bfloat16_is_chosen_by_what_the_cpu_can_do(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert multiplies_bfloat16() == expected


@pytest.mark.parametrize(("avx", "amx"), [(False, False), (True, False), (False, True)])
def test_an_older_torch_is_asked_for_what_the_cpu_can_do(monkeypatch, avx, amx):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert multiplies_bfloat16() == (avx or amx)
