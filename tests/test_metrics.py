import math

import pytest
import torch

from stage1_tokenizer.features import Inception
from tessera.metrics import code_counts, frechet_distance, perplexity, psnr, ssim


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


def test_psnr_is_of_each_picture_in_8_bits():
    """A picture off by d of 255 everywhere has 20 log10(255 / d) dB; differences that 8 bits do not see are none."""
    reference = torch.rand(4, 3, 8, 8).mul(200).round() / 127.5 - 1
    off = torch.tensor([1, 10, 51, 0]).view(4, 1, 1, 1)
    found = psnr(reference + off / 127.5, reference)
    expected = [20 * math.log10(255 / d) for d in (1, 10, 51)]
    assert found.tolist() == pytest.approx([*expected, math.inf], abs=1e-4)
    assert (
        psnr(reference + 0.4 / 127.5, reference).isinf().all()
        and psnr(reference - 0.4 / 127.5, reference).isinf().all()
    )
    assert psnr(torch.full((1, 3, 4, 4), 1.5), torch.ones(1, 3, 4, 4)).isinf().all()  # clipped as saved pictures are
    assert psnr(torch.full((1, 3, 4, 4), -1.5), -torch.ones(1, 3, 4, 4)).isinf().all()


def test_codes_are_counted_by_codebook():
    codes = torch.tensor([[[[0, 1]], [[3, 3]]], [[[1, 1]], [[2, 3]]]])  # (B 2, Q 2, 1, 2)
    counts = code_counts(codes, 5)
    assert counts.tolist() == [[1, 3, 0, 0, 0], [0, 0, 1, 3, 0]]
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert perplexity(counts) == pytest.approx(math.exp(entropy))
    assert perplexity(torch.tensor([[5, 5], [7, 0]])) == pytest.approx(1.5)


def test_inception_reads_pictures_in_8_bits():
    seen = []
    images = torch.tensor([-1.5, -1.0, 0.0, 0.5, 1.0, 1.5]).view(1, 1, 1, 6).expand(2, 3, 1, 6)
    features = Inception(lambda pixels: (seen.append(pixels) or pixels.float().mean((2, 3)), "more"))(images)
    assert seen[0].dtype == torch.uint8 and seen[0][0, 0, 0].tolist() == [0, 0, 128, 191, 255, 255]
    assert features.shape == (2, 3)
