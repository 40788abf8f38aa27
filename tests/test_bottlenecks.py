"""The family's contract, for every bottleneck, and what each promises beyond it."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch.distributions import Categorical, Normal
from torch.distributions import kl_divergence as reference_kl

from stage1_tokenizer.bottlenecks import (
    BottleneckConfig,
    FSQConfig,
    GaussianConfig,
    GumbelConfig,
    HierarchyConfig,
    IdentityConfig,
    LFQConfig,
    ResidualConfig,
    SimVQConfig,
    VQConfig,
    VQEMAConfig,
    build_bottleneck,
)
from stage1_tokenizer.bottlenecks.codebook import Revival, nearest, rotation
from stage1_tokenizer.bottlenecks.gaussian import Posterior, kl_divergence
from stage1_tokenizer.bottlenecks.gumbel import cosine, kl_to_uniform
from stage1_tokenizer.bottlenecks.lfq import entropies
from stage2_prior.base import flatten_codes, unflatten_codes
from tessera.errors import InputError

CONFIGS: list[BottleneckConfig] = [
    IdentityConfig(),
    GaussianConfig(),
    VQConfig(codebook_size=16),
    VQEMAConfig(codebook_size=16),
    SimVQConfig(codebook_size=16),
    ResidualConfig(num_codebooks=3, codebook_size=16),
    HierarchyConfig(codebook_size=16),
    GumbelConfig(codebook_size=16),
    FSQConfig(levels=(4, 5, 3)),
    LFQConfig(codebook_size=16),
]
CONTINUOUS = [config for config in CONFIGS if config.type in ("identity", "gaussian")]
DISCRETE = [config for config in CONFIGS if config not in CONTINUOUS]
PROJECTED = ("gaussian", "gumbel", "fsq", "lfq")  # a convolution stands between z and codes, or codes and latents
ROTATING = (VQConfig, VQEMAConfig, SimVQConfig, ResidualConfig)
DIM = 4


def built(config):
    torch.manual_seed(0)
    bottleneck = build_bottleneck(config, DIM)
    bottleneck(torch.randn(8, DIM, 4, 4))  # the first training step starts the codebook from data
    return bottleneck


@pytest.fixture(params=CONFIGS, ids=lambda config: config.type)
def bottleneck(request):
    return built(request.param)


@pytest.mark.parametrize("config", DISCRETE, ids=lambda config: config.type)
def test_codes_are_in_range_and_shaped(config):
    bottleneck = built(config).eval()
    codes = bottleneck(torch.randn(3, DIM, 2, 6)).codes
    shape = (3, bottleneck.num_codebooks, 2 // bottleneck.stride, 6 // bottleneck.stride)
    assert codes.shape == shape and codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < bottleneck.codebook_size


@pytest.mark.parametrize("config", DISCRETE, ids=lambda config: config.type)
def test_lookup_of_codes_is_what_the_decoder_saw(config):
    output = built(config).eval()(torch.randn(3, DIM, 4, 4))
    torch.testing.assert_close(built(config).eval().lookup(output.codes), output.latents, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", CONTINUOUS, ids=lambda config: config.type)
def test_a_continuous_bottleneck_has_no_codes(config):
    bottleneck = built(config)
    output = bottleneck(torch.randn(3, DIM, 2, 5))
    assert output.codes is None and bottleneck.codebook_size is None and bottleneck.num_codebooks == 0
    assert output.latents.shape == (3, DIM, 2, 5)
    with pytest.raises(InputError, match="no codes to look up"):
        bottleneck.lookup(torch.zeros(1, 1, 2, 2, dtype=torch.int64))


def test_gradients_reach_the_encoder(bottleneck):
    for mode in (True, False):
        z = torch.randn(2, DIM, 4, 4, requires_grad=True)
        bottleneck.train(mode)(z).latents.square().sum().backward()
        assert z.grad.isfinite().all() and (z.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.type not in PROJECTED], ids=lambda config: config.type)
def test_gradients_pass_straight_through_to_the_encoder(config):
    z = torch.randn(2, DIM, 4, 4, requires_grad=True)
    weights = torch.randn(2, DIM, 4, 4)
    (built(config).eval()(z).latents * weights).sum().backward()
    torch.testing.assert_close(z.grad, weights)


def test_saved_state_gives_the_same_codes_and_latents(bottleneck):
    config = next(c for c in CONFIGS if type(build_bottleneck(c, DIM)) is type(bottleneck))
    again = build_bottleneck(config, DIM)
    again.load_state_dict(bottleneck.state_dict())
    z = torch.randn(2, DIM, 4, 4)
    expected, found = bottleneck.eval()(z), again.eval()(z)
    assert torch.equal(expected.latents, found.latents) and torch.equal(expected.loss, found.loss)


def test_evaluation_changes_no_state(bottleneck):
    before = copy.deepcopy(bottleneck.eval().state_dict())
    bottleneck(torch.randn(4, DIM, 4, 4))
    for name, tensor in bottleneck.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_nearest_equals_brute_force():
    vectors, codebook = torch.randn(50, DIM), torch.randn(16, DIM)
    brute = [min(range(16), key=lambda k: float((vector - codebook[k]).norm())) for vector in vectors]
    assert nearest(vectors, codebook).tolist() == brute


@pytest.mark.parametrize("kind", [VQConfig, VQEMAConfig, SimVQConfig, LFQConfig])
def test_commitment_weight_multiplies_the_commitment_term(kind):
    torch.manual_seed(0)
    z = torch.randn(2, DIM, 3, 3)
    light = build_bottleneck(kind(codebook_size=16, beta=0.25), DIM).eval()
    heavy = copy.deepcopy(light)
    heavy.beta = 1.25
    committed, quantized = z, light(z).latents
    if kind is LFQConfig:
        committed = light.project(z)
        quantized = committed.sign()
    torch.testing.assert_close(heavy(z).loss - light(z).loss, (committed - quantized).square().mean())


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
        quantizer = build_bottleneck(kind(codebook_size=64, patience=patience), DIM)
        if isinstance(quantizer.codebook, torch.nn.Parameter):
            optimizer = torch.optim.SGD([quantizer.codebook], lr=0.1)
        used = torch.zeros(64, dtype=torch.bool)
        for step in range(60):
            loss = quantizer(torch.randn(16, DIM, 2, 2) + 20).loss  # far from where codes start
            if loss.requires_grad:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if step >= 50:
                used |= torch.zeros(64, dtype=torch.bool).index_fill_(
                    0, quantizer.eval()(torch.randn(64, DIM, 2, 2) + 20).codes.unique(), True
                )
                quantizer.train()
        return used.float().mean()

    assert usage(patience=0) < 0.2 and usage(patience=10) > 0.9


# The gradient ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROTATING)
def test_the_kinds_of_gradient_are_equal_in_the_forward_and_differ_in_the_backward(kind):
    z = torch.randn(2, DIM, 4, 4)
    gradients = []
    for gradient in ("straight-through", "rotation"):
        quantizer = built(kind(codebook_size=16, gradient=gradient))
        start = z.clone().requires_grad_()
        output = quantizer.eval()(start)
        assert torch.equal(output.latents, built(kind(codebook_size=16)).eval()(z).latents)
        (output.latents * torch.linspace(-1, 1, z.numel()).view_as(z)).sum().backward()
        gradients.append(start.grad)
    assert not torch.allclose(*gradients)


def test_rotation_is_an_orthogonal_map_that_brings_z_to_its_code():
    """Against matrices built from two Householder reflections a position."""
    torch.manual_seed(0)
    z = torch.randn(2, DIM, 3, 3, dtype=torch.float64, requires_grad=True)
    quantized, weights = torch.randn(2, 2, DIM, 3, 3, dtype=torch.float64)
    output = rotation(z, quantized)
    assert torch.equal(output, quantized)
    (output * weights).sum().backward()
    eye = torch.eye(DIM, dtype=torch.float64)
    for b, y, x in [(0, 0, 0), (1, 2, 1), (0, 1, 2)]:
        e, q = F.normalize(z.detach()[b, :, y, x], dim=0), F.normalize(quantized[b, :, y, x], dim=0)
        middle = F.normalize(e + q, dim=0)
        # reflecting e in the plane across itself gives -e, in the plane across the bisector then q
        matrix = (eye - 2 * torch.outer(middle, middle)) @ (eye - 2 * torch.outer(e, e))
        torch.testing.assert_close(matrix @ e, q)
        torch.testing.assert_close(matrix @ matrix.T, eye)
        scale = quantized[b, :, y, x].norm() / z.detach()[b, :, y, x].norm()
        torch.testing.assert_close(z.grad[b, :, y, x], scale * matrix.T @ weights[b, :, y, x])


def test_rotation_of_a_parallel_code_only_scales_and_an_opposite_or_zero_one_stays_finite():
    z = torch.randn(1, DIM, 1, 1, requires_grad=True)
    weights = torch.randn(1, DIM, 1, 1)
    (rotation(z, 3 * z.detach()) * weights).sum().backward()
    torch.testing.assert_close(z.grad, 3 * weights)
    for quantized in (-z.detach(), torch.zeros(1, DIM, 1, 1)):
        z.grad = None
        rotation(z, quantized).sum().backward()
        assert z.grad.isfinite().all()


# Each member against an independent calculation -----------------------------------------------------------------------


def test_kl_equals_the_closed_form_and_a_monte_carlo_estimate():
    torch.manual_seed(0)
    mean, log_variance = torch.randn(2, 3, DIM, 2, 2)
    q, p = Normal(mean, (0.5 * log_variance).exp()), Normal(torch.tensor(0.0), torch.tensor(1.0))
    kl = kl_divergence(Posterior(mean, log_variance))
    torch.testing.assert_close(kl, reference_kl(q, p).sum(1).mean())
    draws = q.sample((20_000,))
    estimate = (q.log_prob(draws) - p.log_prob(draws)).sum(2).mean()
    assert kl.item() == pytest.approx(estimate.item(), rel=0.02)


def test_gaussian_latents_are_drawn_in_training_and_means_otherwise():
    gaussian = built(GaussianConfig(kl_weight=0.5))
    z = torch.randn(1, DIM, 1, 1).expand(20_000, DIM, 1, 1)
    posterior = gaussian.posterior(z[:1])
    drawn = gaussian(z).latents
    torch.testing.assert_close(drawn.mean(0), posterior.mean[0], rtol=0, atol=0.05)
    torch.testing.assert_close(drawn.std(0), (0.5 * posterior.log_variance[0]).exp(), rtol=0.05, atol=0.01)
    output = gaussian.eval()(z[:1])
    assert torch.equal(output.latents, posterior.mean)
    torch.testing.assert_close(output.loss, 0.5 * kl_divergence(posterior))


def test_the_reparameterised_gradient_is_that_of_the_expectation():
    """E[l^2] = mean^2 + variance, so its gradients by mean and log variance are 2 mean and the variance."""
    gaussian = built(GaussianConfig())
    with torch.no_grad():
        gaussian.project.weight.zero_()
        gaussian.project.bias.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0, 0.0, -1.0, 1.0, 0.5]))
    z = torch.zeros(100_000, DIM, 1, 1)
    gaussian(z).latents.square().mean(0).sum().backward()
    mean, log_variance = gaussian.project.bias.detach().chunk(2)
    expected = torch.cat([2 * mean, log_variance.exp()])
    torch.testing.assert_close(gaussian.project.bias.grad, expected, rtol=0.03, atol=0.03)


def test_l2_codes_are_those_of_the_largest_cosine_whatever_their_length():
    quantizer = built(VQConfig(codebook_size=16, normalize="both", gradient="rotation")).eval()
    z = torch.randn(2, DIM, 3, 3)
    codes = quantizer(z).codes
    for b, y, x in [(0, 0, 0), (1, 2, 1), (0, 1, 2)]:
        cosines = [float(F.cosine_similarity(z[b, :, y, x], row, dim=0)) for row in quantizer.codebook.detach()]
        assert codes[b, 0, y, x] == max(range(16), key=cosines.__getitem__)
    latents = quantizer.lookup(codes)
    with torch.no_grad():
        quantizer.codebook.mul_(torch.rand(16, 1) * 5 + 0.1)
    assert torch.equal(quantizer(z).codes, codes)
    torch.testing.assert_close(quantizer.lookup(codes), latents)


def test_simvq_codes_are_the_nearest_of_the_mapped_codebook_and_all_move_together():
    quantizer = built(SimVQConfig(codebook_size=16, beta=0.0))
    z = torch.randn(1, DIM, 1, 1)
    table = quantizer.codebook @ quantizer.projection.weight.detach().T
    code = min(range(16), key=lambda k: float((z.flatten() - table[k]).norm()))
    output = quantizer(z)
    assert int(output.codes) == code
    output.loss.backward()  # |W c - z|^2 / D by W is 2 (W c - z) c' / D
    expected = 2 * torch.outer(table[code] - z.flatten(), quantizer.codebook[code]) / DIM
    torch.testing.assert_close(quantizer.projection.weight.grad, expected)
    assert [name for name, _ in quantizer.named_parameters()] == ["projection.weight"]
    with torch.no_grad():
        quantizer.projection.weight -= 0.1 * quantizer.projection.weight.grad
    moved = (quantizer.codebook @ quantizer.projection.weight.detach().T - table).norm(dim=1)
    assert (moved > 0).all()


def test_gumbel_is_hard_at_inference_and_soft_in_training():
    quantizer = built(GumbelConfig(codebook_size=16, temperature_steps=0))
    z = torch.randn(2, DIM, 3, 3)
    codes = F.conv2d(z, quantizer.projection.weight, quantizer.projection.bias).argmax(1)
    output = quantizer.eval()(z)
    assert torch.equal(output.codes[:, 0], codes)
    assert torch.equal(output.latents, F.embedding(codes, quantizer.codebook).permute(0, 3, 1, 2))
    torch.manual_seed(1)
    soft = quantizer.train()(z).latents
    assert not torch.equal(soft, output.latents) and not torch.equal(soft, quantizer(z).latents)


def test_gumbel_noise_draws_codes_by_their_probability():
    """At a temperature near 0 the mixture is one row, drawn with the softmax's probabilities."""
    config = GumbelConfig(codebook_size=4, final_temperature=0.01, temperature_steps=0)
    quantizer = build_bottleneck(config, DIM)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.eye(4))
    z = torch.randn(1, DIM, 1, 1).expand(20_000, DIM, 1, 1)
    expected = F.softmax(quantizer.projection(z[:1]), dim=1)[0]
    torch.testing.assert_close(quantizer(z).latents.mean(0), expected, rtol=0, atol=0.015)


def test_gumbel_kl_is_that_to_the_uniform_distribution():
    torch.manual_seed(0)
    logits = torch.randn(2, 8, 3, 3)
    q, p = Categorical(logits=logits.movedim(1, -1)), Categorical(logits=torch.zeros(8))
    torch.testing.assert_close(kl_to_uniform(logits), reference_kl(q, p).mean())
    one_hot = 100 * F.one_hot(torch.zeros(1, 3, 3, dtype=torch.int64), 8).movedim(-1, 1).float()
    assert kl_to_uniform(one_hot).item() == pytest.approx(math.log(8))


def test_gumbel_schedules_count_training_steps_and_go_on_after_loading():
    config = GumbelConfig(codebook_size=16, temperature_steps=8, kl_steps=4, kl_weight=2.0)
    quantizer = build_bottleneck(config, DIM)
    assert quantizer.temperature == 1.0 and quantizer.kl_weight == 0.0
    for _ in range(4):
        quantizer(torch.randn(1, DIM, 2, 2))
    quantizer.eval()(torch.randn(1, DIM, 2, 2))
    again = build_bottleneck(config, DIM)
    again.load_state_dict(quantizer.state_dict())
    assert again.steps == 4 and again.kl_weight == 2.0
    assert again.temperature.item() == pytest.approx((1 + 1 / 16) / 2)
    assert cosine(1.0, 0.5, torch.tensor(99), 8) == 0.5 and cosine(1.0, 0.5, torch.tensor(0), 0) == 0.5
    default = GumbelConfig()
    assert default.temperature_steps > 0 and default.kl_steps > 0  # schedules are on unless turned off


def test_every_fsq_code_is_another_point_of_the_grid_and_codes_are_the_nearest_points():
    quantizer = build_bottleneck(FSQConfig(levels=(4, 5, 3)), DIM).eval()
    every = torch.arange(quantizer.codebook_size).view(1, 1, 6, 10)
    digits = quantizer.digits(every)[0].flatten(1).T  # (K, 3)
    grid = torch.cartesian_prod(torch.arange(-2, 2), torch.arange(-2, 3), torch.arange(-1, 2))
    assert sorted(digits.tolist()) == sorted(grid.tolist())
    torch.manual_seed(0)
    z = 3 * torch.randn(2, DIM, 3, 3)
    bounded = quantizer.bound(quantizer.project(z)).detach()
    for b, y, x in [(0, 0, 0), (1, 2, 1), (0, 1, 2)]:
        distances = (bounded[b, :, y, x] - digits).norm(dim=1)
        assert quantizer(z).codes[b, 0, y, x] == distances.argmin()
    assert torch.equal(quantizer.bound(torch.zeros(1, 3, 1, 1)), torch.zeros(1, 3, 1, 1))
    extremes = quantizer.bound(torch.tensor([-1e9, 1e9]).view(2, 1, 1, 1).expand(2, 3, 1, 1)).round()[..., 0, 0]
    assert extremes.tolist() == [[-2, -2, -1], [1, 2, 1]]


def test_lfq_codes_are_the_bits_of_the_signs():
    quantizer = built(LFQConfig(codebook_size=16)).eval()
    z = torch.randn(2, DIM, 3, 3)
    signs = quantizer.project(z).sign()
    codes = quantizer(z).codes
    for b, y, x in [(0, 0, 0), (1, 2, 1), (0, 1, 2)]:
        bits = "".join("1" if sign > 0 else "0" for sign in reversed(signs[b, :, y, x].tolist()))
        assert int(codes[b, 0, y, x]) == int(bits, 2)
    torch.testing.assert_close(quantizer.lookup(codes), quantizer.expand(signs))


def test_lfq_entropies_equal_those_over_all_codes():
    torch.manual_seed(0)
    vectors = torch.randn(20, 3)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    q = F.softmax(-torch.cdist(vectors, corners).square() / 0.7, dim=1)
    sure, spread = entropies(vectors, 0.7)
    torch.testing.assert_close(sure, Categorical(q).entropy().mean())
    torch.testing.assert_close(spread, Categorical(q.mean(0)).entropy())
    # bits beyond a group add up, which is exact for the entropy of a position
    wide = torch.randn(20, 12)
    share = torch.sigmoid(4 * wide / 0.7)
    expected = -(share * share.log() + (1 - share) * (1 - share).log()).sum(1).mean()
    torch.testing.assert_close(entropies(wide, 0.7)[0], expected, rtol=1e-4, atol=1e-4)


def test_lfq_entropy_loss_brings_codes_into_use():
    def used(weight):
        torch.manual_seed(0)
        quantizer = build_bottleneck(LFQConfig(codebook_size=64, entropy_weight=weight), DIM)
        with torch.no_grad():
            quantizer.project.bias.add_(3.0)  # all bits are set
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
        for _ in range(100):
            optimizer.zero_grad()
            quantizer(torch.randn(32, DIM, 2, 2)).loss.backward()
            optimizer.step()
        return len(quantizer.eval()(torch.randn(256, DIM, 2, 2)).codes.unique())

    assert used(0.0) <= 4 and used(1.0) > 12  # 6 bits of 4 numbers cannot all be set at will


def test_the_bottom_level_quantizes_what_the_top_leaves_over():
    hierarchy = built(HierarchyConfig(codebook_size=16)).eval()
    z = torch.randn(1, DIM, 4, 6)
    output = hierarchy(z)
    coarse = hierarchy.lookup_top(output.codes)
    means = hierarchy.down(z)
    for y, x in [(0, 0), (1, 2)]:
        row = hierarchy.top.codebook[int(output.codes[0, 0, y, x])]
        assert (means[0, :, y, x] - row).norm() == (means[0, :, y, x] - hierarchy.top.codebook).norm(dim=1).min()
        for inside, (dy, dx) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            place = (0, slice(None), 2 * y + dy, 2 * x + dx)
            left = z[place] - coarse[place]
            code = int(output.codes[0, 1 + inside, y, x])
            assert code == (left - hierarchy.bottom.codebook).norm(dim=1).argmin()
            torch.testing.assert_close(output.latents[place], coarse[place] + hierarchy.bottom.codebook[code])


def test_without_its_bottom_level_a_hierarchy_only_loses_detail():
    """Latents of 8 coarse vectors, each for 2 x 2 places, plus 4 patterns of detail that add up to 0 there."""
    torch.manual_seed(0)
    coarse_vectors, details = 3 * torch.randn(8, DIM), torch.randn(4, DIM, 2, 2)
    details = details - details.mean((2, 3), keepdim=True)

    def draw(batch):
        coarse = coarse_vectors[torch.randint(8, (batch, 3, 3))].permute(0, 3, 1, 2)
        coarse = F.interpolate(coarse, scale_factor=2.0)
        fine = details[torch.randint(4, (batch, 3, 3))]  # (B, 3, 3, D, 2, 2)
        return coarse, coarse + fine.permute(0, 3, 1, 4, 2, 5).reshape(batch, DIM, 6, 6)

    hierarchy = build_bottleneck(HierarchyConfig(codebook_size=32, decay=0.9, patience=10), DIM)
    optimizer = torch.optim.Adam(hierarchy.parameters(), lr=1e-3)
    for _ in range(150):
        optimizer.zero_grad()
        hierarchy(draw(16)[1]).loss.backward()
        optimizer.step()
    coarse, z = draw(64)
    codes = hierarchy.eval()(z).codes
    whole, top = hierarchy.lookup(codes), hierarchy.lookup_top(codes)
    assert (whole - z).square().mean() < 0.1 * (top - z).square().mean()  # the detail is in the bottom level
    assert (F.avg_pool2d(top - z, 2)).square().mean() < 0.02 * coarse.square().mean()  # and nothing else is


def test_codes_of_two_grids_are_one_sequence():
    hierarchy = built(HierarchyConfig(codebook_size=16)).eval()
    output = hierarchy(torch.randn(2, DIM, 4, 6))
    sequence = flatten_codes(output.codes)  # (B, T)
    assert sequence.shape == (2, 5 * 2 * 3)
    again = hierarchy.lookup(unflatten_codes(sequence, (5, 2, 3)))
    assert torch.equal(again, output.latents)
    changed = sequence.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 16  # the second place's top code
    moved = (hierarchy.lookup(unflatten_codes(changed, (5, 2, 3))) - again).abs().sum((0, 1)) > 0
    assert moved.nonzero().tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]


def test_wrong_sizes_are_refused():
    with pytest.raises(ValidationError, match="power of two"):
        LFQConfig(codebook_size=12)
    with pytest.raises(ValidationError, match="greater than or equal to 3"):
        FSQConfig(levels=(8, 2))


@pytest.mark.parametrize("most", [1, 20, 1000])
def test_the_nearest_code_is_found_in_parts(most, monkeypatch):
    """However few distances are computed at once, the same codes as by brute force."""
    monkeypatch.setattr("stage1_tokenizer.bottlenecks.codebook.MOST_DISTANCES", most)
    vectors, codebook = torch.randn(13, 4), torch.randn(7, 4)
    codes = nearest(vectors, codebook)
    distances = (vectors[:, None] - codebook).square().sum(-1)
    assert torch.equal(codes, distances.argmin(1))
