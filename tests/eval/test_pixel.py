"""PSNR and SSIM against scikit-image."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from eval.pixel import ImageMean, psnr, ssim


@pytest.fixture
def pair(pictures, degraded):
    images = pictures(3, 40)
    return images, degraded(images, 30)


def tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def test_psnr_equals_scikit_image(pair):
    expected = [peak_signal_noise_ratio(a, b) for a, b in zip(*pair, strict=True)]
    np.testing.assert_allclose(psnr(*map(tensor, pair)), expected, rtol=0, atol=1e-9)


def test_psnr_of_one_grey_level_everywhere_is_known():
    black = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert psnr(black, black + 1).item() == pytest.approx(20 * np.log10(255), rel=1e-14)
    assert psnr(black, black + 255).item() == pytest.approx(0, abs=1e-14)


def test_psnr_counts_without_overflow_on_large_pictures():
    black = torch.zeros(1, 3, 2048, 2048, dtype=torch.uint8)
    assert psnr(black, black + 255).item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize(
    ("window", "options"),
    [
        ("uniform7", {}),
        ("gaussian11", {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_ssim_equals_scikit_image(pair, window, options, dtype, tolerance):
    expected = [
        structural_similarity(a / 255, b / 255, data_range=1.0, channel_axis=2, **options)
        for a, b in zip(*pair, strict=True)
    ]
    found = ssim(*map(tensor, pair), window, dtype)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def test_equal_pictures_have_ssim_one_and_infinite_psnr(pictures):
    images = tensor(pictures(2))
    assert ssim(images, images, "gaussian11").tolist() == pytest.approx([1, 1], abs=1e-6)
    mean = ImageMean()
    mean.update(psnr(images, images.clone()))
    with pytest.raises(ValueError, match="2 of 2 pictures are reproduced exactly"):
        mean.compute()


def test_what_is_not_a_number_is_not_called_an_exact_reproduction():
    mean = ImageMean()
    mean.update(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="not a number for 1 of 2 pictures"):
        mean.compute()


@pytest.mark.parametrize(("window", "size"), [("gaussian11", 10), ("uniform7", 6)])
def test_pictures_smaller_than_the_window_are_refused(window, size):
    small = torch.zeros(1, 3, size, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"{size}x64 are smaller than the {size + 1}x{size + 1}"):
        ssim(small, small, window)


def test_means_merge():
    values = torch.rand(9, dtype=torch.float64)
    merged, rest = ImageMean(), ImageMean()
    merged.update(values[:2])
    rest.update(values[2:])
    merged.merge(rest)
    assert merged.compute() == pytest.approx(float(values.mean()), rel=1e-14)
