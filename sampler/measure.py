"""Measured spectra: how much power a latent or a picture has per frequency (docs/sampling.md, "Measured spectra")."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .spectrum import radial_bands, unpatchify

SMALLEST = 8  # grid cells of a side, below which a windowed spectrum has no coarse end


def band_spectrum(latent: Tensor, patch_size: int, num_bins: int) -> Tensor:
    """Mean power in each of the bands that noise is coloured in (`radial_bands`).

    >>> band_spectrum(torch.zeros(1, 128, 4, 4), 2, 8).tolist()[:2]
    [0.0, 0.0]

    Args:
        latent: [B, C, h, w], finite.
        patch_size: 2 unpacks FLUX.2's latents; 1 leaves latents as they are.
        num_bins: counts the bands.

    Returns:
        float64 [num_bins], of the orthonormal FFT (white unit noise has 1), averaged over batch and channels; NaN in a
        band without a mode.
    """
    power = _mean_power(unpatchify(latent.detach().cpu().double(), patch_size))
    height, width = power.shape
    index, count = radial_bands(height, width, num_bins)
    mirrored = torch.arange(width, device="cpu")
    mirrored = torch.minimum(mirrored, width - mirrored)  # the rfft half holds every |fx|
    total = torch.bincount(index[:, mirrored].flatten(), weights=power.flatten(), minlength=num_bins)
    return torch.where(count > 0, total / count, torch.nan)


def half_octave_spectrum(planes: Tensor, cell: int = 1, check: Callable[[], object] = lambda: None) -> dict[int, float]:
    """Mean power per half octave of wavelength, so that grids of different sizes can be compared.

    Half octave k holds the modes whose wavelength in pixels is nearest to ``2^(k/2)`` on a logarithmic scale. The
    mean is removed and a Hann window applied: a picture does not repeat, and without the window the step between its
    opposite edges hides the true power of a smooth one. The window smears the two coarsest half octaves.

    >>> sorted(half_octave_spectrum(torch.randn(3, 8, 8)))
    [1, 2, 3, 4, 5, 6]

    Args:
        planes: [..., H, W], finite; H and W at least 8.
        cell: counts the pixels of a grid cell, a power of 2: 8 for an unpatchified latent.
        check: is called before each plane [H, W] and may raise to stop.

    Returns:
        power by k, of the orthonormal FFT (white unit noise has 1), averaged over the leading axes. A half octave
        without a mode is left out.

    Raises:
        ValueError: a side is under 8 cells, or a value is NaN or infinite.
    """
    height, width = planes.shape[-2:]
    if min(height, width) < SMALLEST:
        raise ValueError(
            f"it is {width}x{height}; a spectrum needs at least {SMALLEST} on each side. Use a larger one."
        )
    if not planes.isfinite().all():
        raise ValueError("it holds NaN or infinite values, which have no spectrum. Make it again.")
    window = _hann(height)[:, None] * _hann(width)
    flat = planes.detach().cpu().flatten(0, -3).double()
    power = torch.zeros(height, width, dtype=torch.float64, device="cpu")
    for plane in flat:  # one at a time: a large picture's FFT is large
        check()
        if plane.max() == plane.min():
            continue  # without power; rounding would give it some
        centred = plane - (plane * window).sum() / window.sum()
        power += _mean_power((centred * window)[None])
    power /= len(flat) * window.square().mean()
    band = _half_octaves(height, width).flatten()
    finest = int(band[1:].min())  # the first mode is the mean, which has no wavelength
    count = torch.bincount(band[1:] - finest)
    total = torch.bincount(band[1:] - finest, weights=power.flatten()[1:])
    shift = finest + 2 * (cell.bit_length() - 1)
    return {shift + i: float(total[i] / count[i]) for i in range(len(count)) if count[i]}


def wavelength(half_octave: int) -> float:
    """Pixels of one wave in the middle of a half octave, a key of `half_octave_spectrum`.

    >>> wavelength(4)
    4.0
    """
    return 2.0 ** (half_octave / 2)


def decibels(power: float, reference: float) -> float:
    """``10·log10(power / reference)``: 3 is twice the power. NaN where neither has any; infinite where one has none.

    >>> round(decibels(2.0, 1.0), 2)
    3.01
    """
    if power > 0 and reference > 0:
        return 10.0 * math.log10(power / reference)
    return math.nan if power == reference else math.copysign(math.inf, power - reference)


def _mean_power(grid: Tensor) -> Tensor:
    """[H, W] of [..., H, W]: power of the orthonormal FFT."""
    return torch.fft.fft2(grid, norm="ortho").abs().square().flatten(0, -3).mean(0)


def _hann(size: int) -> Tensor:
    cell = torch.arange(size, dtype=torch.float64, device="cpu")
    return torch.sin(math.pi * (cell + 0.5) / size).square()


def _half_octaves(height: int, width: int) -> Tensor:
    """k of every mode, int64 [height, width]; that of the mean, [0, 0], is meaningless."""
    fy, fx = (torch.fft.fftfreq(side, dtype=torch.float64, device="cpu") for side in (height, width))
    radius = torch.hypot(fy[:, None], fx[None, :])
    radius[0, 0] = 1.0
    # so that rounding decides for no mode which lies on the border of two
    return torch.floor(0.5 - 2.0 * radius.log2() + 1e-9).long()
