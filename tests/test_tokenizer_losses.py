"""Law 5: each loss moves only the parameters it should, and the adaptive weight is the ratio of gradient norms."""

import math
import shutil
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F

from stage1_tokenizer.losses.adversarial import (
    LeCam,
    PatchDiscriminator,
    adversarial_losses,
    frozen,
    gradient_penalty,
    gradient_ratio,
    hinge_discriminator,
    hinge_generator,
    non_saturating_discriminator,
    non_saturating_generator,
)
from stage1_tokenizer.losses.perceptual import LPIPS, LPIPSConfig, build_perceptual
from stage1_tokenizer.losses.pixels import bernoulli_loss, logit_laplace_loss, to_images
from stage1_tokenizer.train import LossConfig, adversarial_share, pixel_loss
from tessera.errors import InputError
from tests.test_autoencoder import tiny


def gradients(module):
    return [p.grad is not None and bool(p.grad.any()) for p in module.parameters()]


def test_hinge_losses_equal_their_definition():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 0.5])
    assert hinge_discriminator(real, fake).item() == pytest.approx(0.5 * (0.5 + 0.75))
    assert hinge_generator(fake).item() == pytest.approx(1.25)


def test_the_ratio_is_that_of_the_gradient_norms():
    weight = torch.randn(5, requires_grad=True)
    first, second = (3 * weight).sum(), (weight**2).sum()
    expected = (9 * 5) ** 0.5 / (2 * weight).norm().item()
    assert gradient_ratio(first, second, at=weight).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["hinge", "non-saturating"])
def test_the_ratio_at_the_last_layer_is_that_of_the_gradients_training_would_take(kind):
    model, discriminator = tiny(), PatchDiscriminator(channels=8, depth=2)
    images, weight = torch.rand(2, 3, 16, 16) * 2 - 1, model.decoder.conv_out.weight

    def losses():
        output = model(images)
        with frozen(discriminator):
            fooling = adversarial_losses(kind).generator(discriminator(output.images))
        return F.l1_loss(output.images, images), fooling

    norms = []
    for index in range(2):
        model.zero_grad()
        losses()[index].backward()
        norms.append(weight.grad.norm().item())
    ratio = gradient_ratio(*losses(), at=weight)
    assert ratio.item() == pytest.approx(norms[0] / norms[1], rel=1e-3) and not ratio.requires_grad


@pytest.mark.parametrize("kind", ["hinge", "non-saturating"])
def test_generator_loss_moves_the_autoencoder_and_leaves_the_discriminator(kind):
    model, discriminator = tiny(), PatchDiscriminator(channels=8, depth=2)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with frozen(discriminator):
        adversarial_losses(kind).generator(discriminator(model(images).images)).backward()
    assert all(gradients(model.decoder)) and any(gradients(model.encoder))
    assert not any(gradients(discriminator))
    assert all(p.requires_grad for p in discriminator.parameters())


@pytest.mark.parametrize("kind", ["hinge", "non-saturating"])
def test_discriminator_loss_never_moves_the_autoencoder(kind):
    model, discriminator = tiny(), PatchDiscriminator(channels=8, depth=2)
    images = (torch.rand(2, 3, 16, 16) * 2 - 1).requires_grad_()
    output = model(images)
    real, fake = discriminator(images), discriminator(output.images.detach())
    loss = adversarial_losses(kind).discriminator(real, fake) + gradient_penalty(real, images) + LeCam()(real, fake)
    loss.backward()
    assert any(gradients(discriminator)) and not any(gradients(model))


def test_reconstruction_moves_encoder_and_decoder_not_an_averaged_codebook():
    model = tiny()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    F.l1_loss(model(images).images, images).backward()
    assert any(gradients(model.encoder)) and all(gradients(model.decoder))
    assert not list(model.bottleneck.parameters())


# Pixels ---------------------------------------------------------------------------------------------------------------


def test_bernoulli_loss_is_the_cross_entropy_of_shares_of_white():
    torch.manual_seed(0)
    output, images = torch.randn(2, 3, 4, 4, requires_grad=True), torch.rand(2, 3, 4, 4) * 2 - 1
    loss = bernoulli_loss(output, images)
    p, white = torch.sigmoid(output.detach()), (images + 1) / 2
    torch.testing.assert_close(loss, -(white * p.log() + (1 - white) * (1 - p).log()).mean())
    loss.backward()
    torch.testing.assert_close(output.grad, (p - white) / output.numel())
    torch.testing.assert_close(to_images(torch.logit(white), "bernoulli"), images, rtol=0, atol=1e-5)


def test_the_logit_laplace_density_integrates_to_one():
    """Over all of (0, 1), into the middle of which pictures are brought: 1.25 is where a picture would reach 1."""
    grid = torch.linspace(-1.25, 1.25, 200_002)[1:-1]
    for mean, log_scale in [(0.0, 0.0), (1.0, -1.0), (-0.5, -2.0)]:
        output = torch.tensor([mean] * 3 + [log_scale] * 3).view(1, 6, 1, 1)
        loss = torch.stack([logit_laplace_loss(output, x.view(1, 1, 1, 1)) for x in grid[::2000]])
        # the scalar loss at some points equals the formula, which is then summed over all of them
        x = (grid + 1) * 0.4 + 0.1
        density = torch.exp(-(torch.logit(x) - mean).abs() / math.exp(log_scale)) / (2 * math.exp(log_scale))
        density = density / (x * (1 - x))
        torch.testing.assert_close(loss, -density[::2000].log(), rtol=1e-3, atol=1e-3)
        assert (density.sum() * (x[1] - x[0])).item() == pytest.approx(1, abs=0.01)


def test_logit_laplace_gradients_equal_their_closed_form():
    torch.manual_seed(0)
    output, images = torch.randn(2, 6, 4, 4, requires_grad=True), torch.rand(2, 3, 4, 4) * 2 - 1
    logit_laplace_loss(output, images).backward()
    mean, log_scale = output.detach().chunk(2, dim=1)
    difference = torch.logit((images + 1) * 0.4 + 0.1) - mean
    by_mean = -difference.sign() / log_scale.exp()
    by_scale = 1 - difference.abs() / log_scale.exp()
    torch.testing.assert_close(output.grad, torch.cat([by_mean, by_scale], dim=1) / images.numel())
    exact = torch.cat([torch.logit((images + 1) * 0.4 + 0.1), torch.zeros_like(images)], dim=1)
    torch.testing.assert_close(to_images(exact, "logit-laplace"), images, rtol=0, atol=1e-5)


def test_pixel_losses_add_up_by_their_weights():
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    output = tiny(pixels="bernoulli")(images)
    config = LossConfig(l1_weight=2.0, l2_weight=3.0, bernoulli_weight=0.5)
    expected = 2 * F.l1_loss(output.images, images) + 3 * F.mse_loss(output.images, images)
    torch.testing.assert_close(
        pixel_loss(output, images, config), expected + 0.5 * bernoulli_loss(output.output, images)
    )


# Adversary ------------------------------------------------------------------------------------------------------------


def test_non_saturating_losses_equal_their_definition():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 0.5], requires_grad=True)
    p_real, p_fake = torch.sigmoid(real), torch.sigmoid(fake.detach())
    expected = -0.5 * (p_real.log().mean() + (1 - p_fake).log().mean())
    torch.testing.assert_close(non_saturating_discriminator(real, fake.detach()), expected)
    loss = non_saturating_generator(fake)
    torch.testing.assert_close(loss, -p_fake.log().mean())
    loss.backward()
    torch.testing.assert_close(fake.grad, -(1 - p_fake) / 2)  # largest where a fake is found out
    nothing = torch.zeros(4)
    assert non_saturating_discriminator(nothing, nothing).item() == pytest.approx(math.log(2))


def test_the_gradient_penalty_of_a_linear_discriminator_is_the_square_of_its_weights():
    weight = torch.randn(3, 4, 4, requires_grad=True)
    images = torch.randn(5, 3, 4, 4, requires_grad=True)
    logits = (weight * images).sum((1, 2, 3)).view(5, 1, 1, 1).expand(5, 1, 2, 2)  # patches alike: their mean is each
    penalty = gradient_penalty(logits, images)
    torch.testing.assert_close(penalty, weight.detach().square().sum())
    penalty.backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach())


def test_lecam_pulls_logits_to_the_running_mean_of_the_other_side():
    lecam = LeCam(decay=0.9)
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -2.0])
    assert lecam(real, fake).item() == pytest.approx((2.5**2 + 4.5**2) / 2 + (3**2 + 4**2) / 2)
    real_mean, fake_mean = 0.9 * 2 + 0.1 * 4, 0.9 * -1.5 + 0.1 * -3.5
    real, fake = torch.tensor([4.0], requires_grad=True), torch.tensor([-3.5], requires_grad=True)
    loss = lecam(real, fake)
    assert loss.item() == pytest.approx((4 - fake_mean) ** 2 + (-3.5 - real_mean) ** 2)
    loss.backward()
    assert real.grad.item() == pytest.approx(2 * (4 - fake_mean))
    assert fake.grad.item() == pytest.approx(2 * (-3.5 - real_mean))


def test_the_adversarial_weight_waits_for_the_discriminator_and_then_grows():
    config = LossConfig(adversarial_from=10, adversarial_warmup=5, adversarial_ramp=4)
    assert [adversarial_share(step, config) for step in range(13, 21)] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    at_once = LossConfig(adversarial_from=10)
    assert adversarial_share(9, at_once) == 0 and adversarial_share(10, at_once) == 1


# LPIPS ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory):
    """A file of torchvision's SqueezeNet with random weights."""
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.save(squeezenet1_1(weights=None).state_dict(), path)
    return path


def test_lpips_with_local_weights_equals_torchmetrics(squeezenet, tmp_path):
    """Value and gradient are those of its functional form, which finds the weights where a download would be."""
    pytest.importorskip("torchmetrics")
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity
    from torchvision.models import SqueezeNet1_1_Weights

    before = torch.hub.get_dir()
    lpips = build_perceptual(LPIPSConfig(net="squeeze", weights=squeezenet))
    assert torch.hub.get_dir() == before
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(squeezenet, tmp_path / "checkpoints" / Path(SqueezeNet1_1_Weights.DEFAULT.url).name)
    first, second = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    images, same = first.clone().requires_grad_(), first.clone().requires_grad_()
    torch.hub.set_dir(tmp_path)
    try:
        expected = learned_perceptual_image_patch_similarity(same, second, net_type="squeeze")
    finally:
        torch.hub.set_dir(before)
    expected.backward()
    for _ in range(2):  # a value is that of its own images, not of all so far
        images.grad = None
        distance = lpips(images, second)
        torch.testing.assert_close(distance, expected, rtol=1e-5, atol=1e-7)
        distance.backward()
        torch.testing.assert_close(images.grad, same.grad, rtol=1e-4, atol=1e-7)
    assert images.grad.any()
    states = lpips.metric.metric_state.values()  # of a training, nothing accumulates
    assert not any(len(one) if isinstance(one, list) else float(one) for one in states)
    torch.testing.assert_close(lpips(first[:1], second[:1]) + lpips(first[1:], second[1:]), 2 * expected.detach())
    assert lpips(first * torch.nan, second).isnan()  # which a training reports with its step
    assert lpips(first, first) == 0 and not any(p.requires_grad for p in lpips.parameters())
    assert not any(module.training for module in lpips.train().modules())


def test_lpips_without_torchmetrics_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    with pytest.raises(InputError, match="LPIPS needs torchmetrics: pip install 'tessera\\[metrics\\]'"):
        LPIPS("vgg")


def test_lpips_says_what_is_wrong_with_its_weights(squeezenet, tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    with pytest.raises(InputError, match="is not a file; give torchvision's weights of vgg16"):
        LPIPS("vgg", tmp_path / "missing.pth")
    with pytest.raises(InputError, match="does not hold torchvision's alexnet"):
        LPIPS("alex", squeezenet)
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(InputError, match="cannot be read as weights"):
        LPIPS("squeeze", tmp_path / "text.pth")
    torch.save({"features.0.weight": print}, tmp_path / "code.pth")
    with pytest.raises(InputError, match="cannot be read as weights"):
        LPIPS("squeeze", tmp_path / "code.pth")

    def offline(*arguments, **options):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(InputError, match="cannot be downloaded .*no network.*loss.perceptual.weights"):
        LPIPS("squeeze")


def test_the_discriminator_is_the_paper_s():
    """Isola et al. 2017: C64-C128-C256-C512 of 4 x 4 kernels, three of stride 2, and a 70 x 70 field of view."""
    discriminator = PatchDiscriminator()
    convolutions = [layer for layer in discriminator.layers if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64, 128, 256, 512, 1]
    assert [layer.in_channels for layer in convolutions] == [3, 64, 128, 256, 512]
    assert [layer.stride[0] for layer in convolutions] == [2, 2, 2, 1, 1]
    assert {layer.kernel_size + layer.padding for layer in convolutions} == {(4, 4, 1, 1)}
    assert [layer.bias is not None for layer in convolutions] == [True, False, False, False, True]
    slopes = {layer.negative_slope for layer in discriminator.layers if isinstance(layer, torch.nn.LeakyReLU)}
    groups = {layer.num_groups for layer in discriminator.layers if isinstance(layer, torch.nn.GroupNorm)}
    assert slopes == {0.2} and groups == {8} and len(discriminator.layers) == 2 + 3 * 3 + 1
    view = 1
    for layer in reversed(convolutions):
        view = (view - 1) * layer.stride[0] + 4
    assert view == 70 and discriminator(torch.zeros(1, 3, 128, 128)).shape == (1, 1, 14, 14)
    deep = PatchDiscriminator(channels=8, depth=5)
    assert [layer.out_channels for layer in deep.layers if isinstance(layer, torch.nn.Conv2d)] == [
        8,
        16,
        32,
        64,
        64,
        64,
        1,
    ]
