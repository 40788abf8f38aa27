"""The family's contract, for every bottleneck, and what each promises beyond it."""

import copy

import pytest
import torch

from stage1_tokenizer.bottlenecks import BottleneckConfig, ResidualConfig, VQConfig, VQEMAConfig, build_bottleneck
from stage1_tokenizer.bottlenecks.codebook import Revival, nearest

CONFIGS: list[BottleneckConfig] = [
    VQConfig(codebook_size=16),
    VQEMAConfig(codebook_size=16),
    ResidualConfig(num_codebooks=3, codebook_size=16),
]
DIM = 4


@pytest.fixture(params=CONFIGS, ids=lambda config: config.type)
def bottleneck(request):
    torch.manual_seed(0)
    built = build_bottleneck(request.param, DIM)
    built(torch.randn(8, DIM, 4, 4))  # the first training step starts the codebook from data
    return built


def test_codes_are_in_range_and_shaped(bottleneck):
    codes = bottleneck.eval()(torch.randn(3, DIM, 2, 5)).codes
    assert codes.shape == (3, bottleneck.num_codebooks, 2, 5) and codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < bottleneck.codebook_size


def test_lookup_of_codes_is_what_the_decoder_saw(bottleneck):
    output = bottleneck.eval()(torch.randn(3, DIM, 4, 4))
    torch.testing.assert_close(bottleneck.lookup(output.codes), output.latents, rtol=0, atol=1e-6)


def test_gradients_pass_straight_through_to_the_encoder(bottleneck):
    z = torch.randn(2, DIM, 3, 3, requires_grad=True)
    weights = torch.randn(2, DIM, 3, 3)
    (bottleneck.eval()(z).latents * weights).sum().backward()
    torch.testing.assert_close(z.grad, weights)


def test_evaluation_changes_no_state(bottleneck):
    before = copy.deepcopy(bottleneck.eval().state_dict())
    bottleneck(torch.randn(4, DIM, 4, 4))
    for name, tensor in bottleneck.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_nearest_equals_brute_force():
    vectors, codebook = torch.randn(50, DIM), torch.randn(16, DIM)
    brute = [min(range(16), key=lambda k: float((vector - codebook[k]).norm())) for vector in vectors]
    assert nearest(vectors, codebook).tolist() == brute


def test_commitment_weight_multiplies_the_commitment_term():
    torch.manual_seed(0)
    z = torch.randn(2, DIM, 3, 3)
    light = build_bottleneck(VQConfig(codebook_size=16, beta=0.25), DIM).eval()
    heavy = copy.deepcopy(light)
    heavy.beta = 1.25
    mse = (z - light(z).latents).square().mean()
    torch.testing.assert_close(heavy(z).loss - light(z).loss, mse)


def test_vq_loss_moves_codes_to_the_encoder_and_the_encoder_to_its_codes():
    torch.manual_seed(0)
    vq = build_bottleneck(VQConfig(codebook_size=16, beta=0.5), DIM).eval()
    z = torch.randn(1, DIM, 1, 1, requires_grad=True)
    output = vq(z)
    output.loss.backward()
    difference = (z - vq.lookup(output.codes)).detach()
    torch.testing.assert_close(z.grad, 0.5 * 2 * difference / DIM)
    code = int(output.codes)
    torch.testing.assert_close(vq.codebook.grad[code], -2 * difference.flatten() / DIM)
    others = torch.arange(16) != code
    assert not vq.codebook.grad[others].any()


def test_ema_codebook_is_the_running_mean_of_what_chose_each_code():
    torch.manual_seed(0)
    ema = build_bottleneck(VQEMAConfig(codebook_size=2, decay=0.9, patience=0), 1)
    ema.codebook.copy_(torch.tensor([[-1.0], [1.0]]))
    ema.sums.copy_(ema.codebook)
    ema(torch.tensor([-3.0, -2.0, 5.0]).view(3, 1, 1, 1))
    # counts: 0.9 * 1 + 0.1 * (2, 1); sums: 0.9 * (-1, 1) + 0.1 * (-5, 5)
    torch.testing.assert_close(ema.codebook.flatten(), torch.tensor([-1.4 / 1.1, 1.4 / 1.0]))


def test_each_residual_code_is_the_nearest_to_what_those_before_left_over():
    torch.manual_seed(0)
    residual = build_bottleneck(ResidualConfig(num_codebooks=3, codebook_size=8, beta=0.5), DIM)
    residual(torch.randn(8, DIM, 4, 4))
    z = torch.randn(1, DIM, 1, 1, requires_grad=True)
    output = residual.eval()(z)
    left, squares = z.detach().flatten(), []
    for q, level in enumerate(residual.levels):
        k = min(range(8), key=lambda k: float((left - level.codebook[k]).norm()))
        assert output.codes[0, q, 0, 0] == k
        left = left - level.codebook[k]
        squares.append(left)
    torch.testing.assert_close(output.loss, 0.5 * torch.stack(squares).square().mean())
    output.loss.backward()  # d/dz of the mean over the three of beta * |z - sum of codes so far|^2 / D
    torch.testing.assert_close(z.grad.flatten(), 0.5 * 2 * torch.stack(squares).mean(0) / DIM)


def test_residual_codebooks_shrink_the_error_one_by_one():
    torch.manual_seed(0)
    residual = build_bottleneck(ResidualConfig(num_codebooks=4, codebook_size=32, decay=0.9, patience=10), DIM)
    for _ in range(100):
        residual(torch.randn(16, DIM, 4, 4))
    z = torch.randn(64, DIM, 4, 4)
    codes, quantized, errors = residual.eval()(z).codes, torch.zeros_like(z), []
    for q, level in enumerate(residual.levels):
        quantized = quantized + level.lookup(codes[:, q : q + 1])
        errors.append(float((z - quantized).square().mean()))
    assert all(after < 0.7 * before for before, after in zip(errors, errors[1:], strict=False))


def test_unused_codes_come_back_as_vectors_that_occur():
    revival = Revival(codebook_size=3, patience=2)
    vectors = torch.tensor([[7.0]])
    used = torch.tensor([5, 0, 1])
    assert revival(used, vectors)[0].tolist() == [0, 1, 2]  # the first step starts all from data
    assert revival(used, vectors)[0].tolist() == []
    dead, replacements = revival(used, vectors)
    assert dead.tolist() == [1] and replacements.tolist() == [[7.0]]
    assert revival(used, vectors)[0].tolist() == []  # and has its time again


@pytest.mark.parametrize("kind", [VQConfig, VQEMAConfig])
def test_revival_fills_a_codebook_that_would_collapse(kind):
    def usage(patience):
        torch.manual_seed(0)
        built = build_bottleneck(kind(codebook_size=64, patience=patience), DIM)
        if isinstance(built.codebook, torch.nn.Parameter):
            optimizer = torch.optim.SGD([built.codebook], lr=0.1)
        used = torch.zeros(64, dtype=torch.bool)
        for step in range(60):
            loss = built(torch.randn(16, DIM, 2, 2) + 20).loss  # far from where codes start
            if loss.requires_grad:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if step >= 50:
                used |= torch.zeros(64, dtype=torch.bool).index_fill_(
                    0, built.eval()(torch.randn(64, DIM, 2, 2) + 20).codes.unique(), True
                )
                built.train()
        return used.float().mean()

    assert usage(patience=0) < 0.2 and usage(patience=10) > 0.9
