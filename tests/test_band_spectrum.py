"""Measured spectra against closed forms: sines, white noise, power laws, and an FFT in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from klein_cns.sampler import band_spectrum, half_octave_spectrum, unpatchify
from klein_cns.sampler.measure import decibels, wavelength

LAWS = [0.0, 1.0, 2.0, 3.0, 4.0]
SLOPE = 0.1  # tolerance of the slope from 2 pixels to a quarter of the side, as docs/sampling.md states it


def field(size, law, rng, period):
    """A piece of size x size, cut out of a Gaussian field of ``period`` cells with power 1 / frequency^law."""
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(period), np.fft.fftfreq(period)))
    radius[0, 0] = np.inf if law else 1.0
    modes = np.fft.fft2(rng.standard_normal((period, period))) * radius ** (-law / 2)
    return torch.from_numpy(np.fft.ifft2(modes).real[:size, :size])


def mean_spectrum(fields):
    found = [half_octave_spectrum(one[None]) for one in fields]
    return {k: float(np.mean([one[k] for one in found])) for k in found[0]}


def slope(spectrum, size):
    kept = {k: power for k, power in spectrum.items() if 2 <= wavelength(k) <= size / 4}
    return np.polyfit([math.log2(wavelength(k)) for k in kept], np.log2(list(kept.values())), 1)[0]


@pytest.mark.parametrize("law", LAWS)
def test_a_piece_of_a_power_law_shows_its_slope(law, seed):
    """Also of a smooth picture that does not repeat."""
    rng = np.random.default_rng(seed)
    found = mean_spectrum(field(256, law, rng, 1024) for _ in range(24))
    assert slope(found, 256) == pytest.approx(law, abs=SLOPE)


def test_without_the_window_the_edges_would_hide_a_smooth_picture(seed):
    """The reason for the window: the step between opposite edges has 1 / f^2 along the axis, above 1 / f^4."""
    rng = np.random.default_rng(seed)
    pieces = torch.stack([field(256, 4.0, rng, 1024) for _ in range(24)])
    power = torch.fft.fft2(pieces, norm="ortho").abs().square().mean(0)[0].numpy()
    frequencies = np.array([8, 16, 32, 64])
    assert np.polyfit(np.log2(frequencies), np.log2(power[frequencies]), 1)[0] == pytest.approx(-2.0, abs=0.3)


def test_white_noise_has_power_one_at_every_wavelength_and_size(seed):
    generator = torch.Generator().manual_seed(seed)
    for height, width in ((64, 64), (96, 40), (61, 75)):
        found = half_octave_spectrum(torch.randn(2, 200, height, width, generator=generator, dtype=torch.float64))
        fine = {k: power for k, power in found.items() if wavelength(k) <= min(height, width) / 4}
        assert len(fine) >= 6
        np.testing.assert_allclose(list(fine.values()), 1.0, atol=0.06)


@pytest.mark.parametrize("period", [2, 4, 8, 16])
def test_a_sine_is_found_at_its_wavelength_with_its_power(period):
    """A wave of amplitude a has variance a²/2 (a² at Nyquist); its modes' powers, summed over the grid, have it too."""
    size, amplitude = 128, 0.3
    wave = amplitude * torch.cos(2 * math.pi * torch.arange(size, dtype=torch.float64) / period)
    found = half_octave_spectrum(wave.expand(1, size, size) + 5.0)
    k = round(2 * math.log2(period))
    counts = {one: int((half_octaves(size) == one).sum()) for one in found}
    total = sum(found[one] * counts[one] for one in found) / size**2
    assert max(found, key=found.get) == k
    variance = amplitude**2 * (1.0 if period == 2 else 0.5)
    assert total == pytest.approx(variance, rel=1e-6)
    assert found[k] * counts[k] / size**2 == pytest.approx(variance, rel=0.01)


def half_octaves(size):
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    with np.errstate(divide="ignore"):
        return np.floor(0.5 - 2 * np.log2(radius) + 1e-9)


def test_sizes_are_compared_by_wavelength(seed):
    """The same texture on a larger canvas has the same power at the same wavelength."""
    rng = np.random.default_rng(seed)
    large = [field(256, 2.0, rng, 1024) for _ in range(24)]
    found, cut = mean_spectrum(large), mean_spectrum([one[:96, :96] for one in large])
    for k in (k for k in cut if wavelength(k) <= 24):
        assert abs(decibels(cut[k], found[k])) < 1.0
    cells = half_octave_spectrum(large[0][None], cell=8)
    assert {k - 6: power for k, power in cells.items()} == half_octave_spectrum(large[0][None])


def test_band_spectrum_is_the_fft_of_the_true_grid(seed):
    """Against NumPy, for packed latents and others, and for odd sides."""
    generator = torch.Generator().manual_seed(seed)
    for shape, patch_size, bins in (((2, 128, 9, 14), 2, 32), ((1, 16, 33, 20), 1, 8), ((1, 4, 3, 12, 10), 1, 32)):
        latent = torch.randn(shape, generator=generator)
        grid = unpatchify(latent, patch_size).double().numpy()
        power = (np.abs(np.fft.fft2(grid, norm="ortho")) ** 2).reshape(-1, *grid.shape[-2:]).mean(0)
        fy, fx = (np.fft.fftfreq(side).astype(np.float32) for side in grid.shape[-2:])
        radius = np.sqrt(fy[:, None] ** 2 + fx[None, :] ** 2)
        index = (radius / radius.max() * np.float32(bins - 1)).astype(int)
        expected = [power[index == k].mean() if (index == k).any() else np.nan for k in range(bins)]
        np.testing.assert_allclose(band_spectrum(latent, patch_size, bins).numpy(), expected, rtol=1e-9)


def test_a_flat_picture_has_no_power_and_bad_ones_are_refused():
    assert set(half_octave_spectrum(torch.full((3, 16, 16), 0.3)).values()) == {0.0}
    with pytest.raises(ValueError, match=r"it is 7x30; a spectrum needs at least 8"):
        half_octave_spectrum(torch.zeros(3, 30, 7))
    with pytest.raises(ValueError, match="NaN or infinite"):
        half_octave_spectrum(torch.full((1, 8, 8), torch.inf))


def test_decibels():
    assert decibels(100.0, 1.0) == pytest.approx(20.0) and decibels(0.5, 1.0) == pytest.approx(-3.0103, abs=1e-4)
    assert math.isnan(decibels(0.0, 0.0))
    assert decibels(1.0, 0.0) == math.inf and decibels(0.0, 1.0) == -math.inf
