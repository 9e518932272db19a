"""Metrics of pictures: closed forms, an implementation window by window, and scikit-image's numbers."""

import math

import numpy
import pytest
import torch

from svdq_compile.quality.metrics import decibels, psnr, sqnr, ssim


def pictures(seed, n=2, size=(17, 21)):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noisy(x, sigma, seed=9):
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x + sigma * noise


def ssim_by_windows(x, y):
    """The definition, one 11 x 11 window after the other, with variances about the window's own mean."""
    offsets = numpy.arange(-5, 6)
    weights = numpy.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = 0.01**2, 0.03**2
    found = []
    for a, b in zip(x.numpy(), y.numpy(), strict=True):
        for row in range(a.shape[0] - 10):
            for column in range(a.shape[1] - 10):
                p, q = (z[row : row + 11, column : column + 11] for z in (a, b))
                mu_p, mu_q = (weights * p).sum(), (weights * q).sum()
                var_p, var_q = (weights * (p - mu_p) ** 2).sum(), (weights * (q - mu_q) ** 2).sum()
                covariance = (weights * (p - mu_p) * (q - mu_q)).sum()
                above = (2 * mu_p * mu_q + c1) * (2 * covariance + c2)
                found.append(above / ((mu_p**2 + mu_q**2 + c1) * (var_p + var_q + c2)))
    return float(numpy.mean(found))


def test_a_picture_and_itself():
    x = pictures(0)
    assert psnr(x, x).tolist() == [math.inf, math.inf]
    assert ssim(x, x).tolist() == [1.0, 1.0]


def test_both_are_symmetric_and_take_pictures_one_by_one():
    x, y = pictures(0), pictures(1)
    for metric in (psnr, ssim):
        assert torch.equal(metric(x, y), metric(y, x))
        assert metric(x, y).tolist() == [float(metric(x[i : i + 1], y[i : i + 1])) for i in range(2)]
    x[1] = y[1]
    assert psnr(x, y)[1] == math.inf > psnr(x, y)[0]


@pytest.mark.parametrize("shift", [0.1, -0.01])
def test_psnr_of_a_brightness_shift(shift):
    x = pictures(0)
    assert psnr(x + shift, x).tolist() == pytest.approx([-20 * math.log10(abs(shift))] * 2)


def test_psnr_of_noise_of_a_known_level():
    x = pictures(0, n=1, size=(200, 200))
    # The mean of 120000 squares is within 2 % of the variance.
    assert float(psnr(noisy(x, 0.05), x)) == pytest.approx(-20 * math.log10(0.05), abs=0.1)


@pytest.mark.parametrize("other", [lambda x: noisy(x, 0.1), lambda x: 1 - x, lambda x: x.flip(-1), lambda x: x**2])
def test_ssim_is_the_definition(other):
    x = pictures(3, n=1)
    y = other(x)
    assert float(ssim(x, y)) == pytest.approx(ssim_by_windows(x[0], y[0]), rel=1e-10)


def test_ssim_of_flat_pictures_is_luminance_alone():
    a, b = (torch.full((1, 3, 11, 12), value, dtype=torch.float64) for value in (0.25, 0.75))
    assert float(ssim(a, b)) == pytest.approx((2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4), rel=1e-12)


def test_ssim_of_a_brightness_shift_is_luminance_alone():
    """Contrast and structure do not change, so a shift hurts PSNR much and SSIM little."""
    x = 0.5 + 0.1 * pictures(4, n=1)
    assert 0.97 < float(ssim(x, x + 0.1)) < 1
    assert float(psnr(x, x + 0.1)) == pytest.approx(20)


def test_ssim_of_a_negative_is_negative():
    x = pictures(5, n=1)
    assert float(ssim(x, 1 - x)) < -0.9


def test_ssim_falls_with_noise():
    x = pictures(6, n=1, size=(64, 64))
    found = [float(ssim(x, noisy(x, sigma))) for sigma in (0.01, 0.05, 0.2, 1.0)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.99
    assert found[-1] < 0.3


def test_scikit_image_finds_the_same():
    """skimage 0.26: structural_similarity(x, y, channel_axis=0, data_range=1, gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False) and peak_signal_noise_ratio(x, y, data_range=1)."""
    i = torch.arange(3 * 24 * 30, dtype=torch.float64).view(1, 3, 24, 30)
    x, y = 0.5 + 0.5 * (0.37 * i).sin(), 0.5 + 0.5 * (0.37 * i + 0.3 * (0.011 * i).cos()).sin()
    assert float(ssim(x, y)) == pytest.approx(0.9776197078433388, rel=1e-9)
    assert float(psnr(x, y)) == pytest.approx(22.556124092422163, rel=1e-9)


def test_what_cannot_be_compared():
    x = pictures(0)
    with pytest.raises(ValueError, match=r"cannot compare \(2, 3, 17, 21\) with \(1, 3, 17, 21\)"):
        psnr(x, x[:1])
    with pytest.raises(ValueError, match="pictures are"):
        ssim(x[0], x[0])
    with pytest.raises(ValueError, match="no window of 11 x 11"):
        ssim(x[..., :10, :], x[..., :10, :])
    with pytest.raises(ValueError, match="cannot compare"):
        sqnr(torch.ones(3), torch.ones(1))


def test_sqnr():
    reference = torch.tensor([3.0, 4.0])
    assert sqnr(reference * 1.125, reference) == pytest.approx(20 * math.log10(8))
    # Noise of power 4 on a signal of power 25.
    assert sqnr(torch.tensor([3.0, 6.0]), reference) == pytest.approx(10 * math.log10(25 / 4))
    assert sqnr(reference.bfloat16(), reference) == math.inf
    assert sqnr(reference, torch.zeros(2)) == -math.inf
    assert math.isnan(sqnr(torch.tensor([math.nan, 4.0]), reference))


def test_decibels_beyond_the_range():
    assert decibels(1.0, 0.0) == decibels(0.0, 0.0) == math.inf
    assert decibels(0.0, 1.0) == decibels(1.0, math.inf) == -math.inf
