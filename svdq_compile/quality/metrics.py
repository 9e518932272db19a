"""SQNR of tensors, PSNR and SSIM of pictures, all in float64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03
"""The constants of Wang et al. 2004."""


def decibels(signal: float, noise: float) -> float:
    """``10 * log10(signal / noise)`` of two sums of squares; infinite without noise, else -infinite without signal."""
    if noise == 0:
        return math.inf
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio != 0 else -math.inf


def powers(y: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``||reference||^2`` and ``||reference - y||^2``, as float64 scalars on the tensors' device."""
    wide = reference.double()
    return wide.square().sum(), (wide - y.double()).square().sum()


def sqnr(y: torch.Tensor, reference: torch.Tensor) -> float:
    """Signal to quantisation noise ratio, ``10 * log10(||reference||^2 / ||reference - y||^2)`` in dB.

    Args:
        y: what a quantised computation gave, any shape and dtype.
        reference: what it should have been, of the same shape.

    Returns:
        Infinity where both are the same, -infinity where only the reference is zero, NaN where either is NaN.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(y, reference)
    return decibels(*map(float, powers(y, reference)))


def psnr(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal to noise ratio, ``-10 * log10(mean((images - reference)^2))`` in dB for a peak of 1.

    Args:
        images: (n, c, h, w) in [0, 1], any dtype.
        reference: as many of the same size.

    Returns:
        (n,) float64, one mean over channels and pixels each; infinity for equal pictures.

    Raises:
        ValueError: the shapes differ or are no such shapes.
    """
    _check_pictures(images, reference)
    return -10 * (images.double() - reference.double()).square().flatten(1).mean(dim=1).log10()


def ssim(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang, Bovik, Sheikh, Simoncelli: Image Quality Assessment, IEEE TIP 13(4), 2004).

    Per window ``(2 mu_x mu_y + C1) (2 s_xy + C2) / ((mu_x^2 + mu_y^2 + C1) (s_x^2 + s_y^2 + C2))`` with C = K^2, of
    means, variances and covariance under an 11 x 11 Gaussian of sigma 1.5 whose weights sum to one. Windows lie wholly
    within the picture.

    Args:
        images: (n, c, h, w) in [0, 1], any dtype; both sides at least 11.
        reference: as many of the same size.

    Returns:
        (n,) float64 in [-1, 1], one mean over channels and windows each; 1 for equal pictures.

    Raises:
        ValueError: the shapes differ or are no such shapes.
    """
    _check_pictures(images, reference)
    if min(images.shape[-2:]) < WINDOW:
        raise ValueError(f"a picture of {tuple(images.shape[-2:])} has no window of {WINDOW} x {WINDOW}")
    # One channel at a time: five float64 maps of a whole picture would be large.
    maps = [_ssim_map(x, y) for x, y in zip(images.double().split(1, dim=1), reference.double().split(1, dim=1))]
    return torch.cat(maps, dim=1).flatten(1).mean(dim=1)


def _ssim_map(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """SSIM of every window of single-channel float64 pictures (n, 1, h, w)."""
    mu_x, mu_y, xx, yy, xy = (_blur(z) for z in (x, y, x * x, y * y, x * y))
    luminance = (2 * mu_x * mu_y + K1**2) / (mu_x * mu_x + mu_y * mu_y + K1**2)
    variance = (xx - mu_x * mu_x) + (yy - mu_y * mu_y)
    return luminance * (2 * (xy - mu_x * mu_y) + K2**2) / (variance + K2**2)


def _blur(x: torch.Tensor) -> torch.Tensor:
    """Gaussian means of all windows that lie within; the Gaussian is separable."""
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=x.device) - WINDOW // 2
    weights = (-offsets.square() / (2 * SIGMA**2)).exp()
    weights = weights / weights.sum()
    return F.conv2d(F.conv2d(x, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


def _check_shapes(x: torch.Tensor, y: torch.Tensor) -> None:
    if x.shape != y.shape:
        raise ValueError(f"cannot compare {tuple(x.shape)} with {tuple(y.shape)}")


def _check_pictures(x: torch.Tensor, y: torch.Tensor) -> None:
    _check_shapes(x, y)
    if x.ndim != 4:
        raise ValueError(f"pictures are (n, c, h, w), not {tuple(x.shape)}")
