import pytest
import torch

from common.metrics import frechet_distance, ssim


def test_frechet_distance_of_gaussians_equals_the_closed_form_in_one_dimension():
    first, second = torch.randn(500, 1) * 3 + 1, torch.randn(400, 1) - 2
    expected = (first.mean() - second.mean()) ** 2 + (first.std() - second.std()) ** 2
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-4)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_equals_torchmetrics_on_fixed_features():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Features(torch.nn.Module):
        num_features = 12

        def forward(self, images):
            return images.flatten(1)

    torch.manual_seed(0)
    mix = torch.randn(12, 12)
    first, second = (torch.randn(200, 12) @ mix).view(-1, 3, 2, 2), (torch.randn(150, 12) @ mix * 1.3).view(-1, 3, 2, 2)
    fid = FrechetInceptionDistance(feature=Features(), normalize=True, input_img_size=(3, 2, 2))
    fid.update(first, real=True)
    fid.update(second, real=False)
    # torchmetrics turns pictures into bytes only for its own Inception
    assert frechet_distance(second.flatten(1), first.flatten(1)) == pytest.approx(float(fid.compute()), abs=1e-3)


def test_ssim_of_equal_pictures_is_one_and_of_shifted_means_the_luminance_term():
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(ssim(pictures, pictures), torch.ones(2))
    flat, other = torch.full((1, 3, 32, 32), -0.2), torch.full((1, 3, 32, 32), 0.4)
    x, y = (round((v + 1) * 127.5) / 255 for v in (-0.2, 0.4))
    expected = (2 * x * y + 0.01**2) / (x * x + y * y + 0.01**2)
    assert float(ssim(flat, other)) == pytest.approx(expected, abs=1e-4)
