"""Law 5: each loss moves only the parameters it should, and the adaptive weight is the ratio of gradient norms."""

import pytest
import torch
import torch.nn.functional as F

from stage1_tokenizer.losses.adversarial import (
    PatchDiscriminator,
    frozen,
    gradient_ratio,
    hinge_discriminator,
    hinge_generator,
)
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


def test_generator_loss_moves_the_autoencoder_and_leaves_the_discriminator():
    model, discriminator = tiny(), PatchDiscriminator(channels=8, depth=2)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with frozen(discriminator):
        hinge_generator(discriminator(model(images).images)).backward()
    assert all(gradients(model.decoder)) and any(gradients(model.encoder))
    assert not any(gradients(discriminator))
    assert all(p.requires_grad for p in discriminator.parameters())


def test_discriminator_loss_never_moves_the_autoencoder():
    model, discriminator = tiny(), PatchDiscriminator(channels=8, depth=2)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    output = model(images)
    hinge_discriminator(discriminator(images), discriminator(output.images.detach())).backward()
    assert any(gradients(discriminator)) and not any(gradients(model))


def test_reconstruction_moves_encoder_and_decoder_not_an_averaged_codebook():
    model = tiny()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    F.l1_loss(model(images).images, images).backward()
    assert any(gradients(model.encoder)) and all(gradients(model.decoder))
    assert not list(model.bottleneck.parameters())
