"""The colour of the noise, against the authors' formula on the full FFT grid and against measured noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from klein_cns.sampler import (
    CNSParams,
    alpha_tilt,
    color_noise,
    patchify,
    shipped_progress,
    spectral_gain,
    unpatchify,
)

GRIDS = [(64, 64), (128, 128), (96, 128), (63, 50), (50, 63), (37, 29), (2, 2), (8, 200)]


def authors_amplitude(gamma, alpha, power, divider, height, width):
    """``cns_sde`` of the authors' code, written down again in NumPy: amplitude of every mode of the full grid."""
    bins = len(gamma)
    energy = np.exp(alpha * np.linspace(0, 1, bins)) * (1 - gamma / divider)
    scaling = np.clip(energy, 0, None) ** power
    fy, fx = np.fft.fftfreq(height).astype(np.float32), np.fft.fftfreq(width).astype(np.float32)
    radius = np.sqrt(fy[:, None] ** 2 + fx[None, :] ** 2)
    index = np.clip((radius / radius.max() * np.float32(bins - 1)).astype(int), 0, bins - 1)
    return scaling[index]


@pytest.mark.parametrize("grid", GRIDS)
def test_authors_formula_is_the_authors_amplitude(grid, seed):
    rng = np.random.default_rng(seed)
    height, width = grid
    for _ in range(20):
        bins = int(rng.integers(8, 129))
        gamma, alpha = rng.random(bins), rng.uniform(-2, 2)
        params = CNSParams(
            formula="authors", power_gamma=rng.uniform(0.1, 3), gamma_divider=rng.uniform(1.01, 50), num_freq_bins=bins
        )
        expected = authors_amplitude(gamma, alpha, params.power_gamma, params.gamma_divider, height, width)
        expected = expected / np.sqrt((expected**2).mean())
        gain = spectral_gain(params, torch.from_numpy(gamma), alpha, height, width).double().numpy()
        np.testing.assert_allclose(gain, expected[:, : width // 2 + 1], rtol=1e-5)


def test_endpoint_formula_in_closed_form():
    gamma = torch.tensor([0.9, 0.5, 0.2, 0.0, 0.1, 0.3, 0.0, 1.0])
    params = CNSParams(num_freq_bins=8, gamma_divider=0.95, power_gamma=0.75)
    gain = spectral_gain(params, gamma, 0.4, 32, 32)
    residual = np.clip(1 - gamma.double().numpy() / 0.95, 0, None) ** 0.75
    power = residual * np.exp(0.4 * np.linspace(0, 1, 8))
    ratio = float(gain[0, 8] ** 2 / gain[0, 0] ** 2)  # radius 8/32 of 0.7071: band 2; DC: band 0
    assert ratio == pytest.approx(power[2] / power[0], rel=1e-5)
    assert gain[16, 16] == 0  # the corner, band 7, is resolved: no noise there


def full_mean_square(gain, width):
    """Mean of β² over the full FFT grid, from its rfft half."""
    weight = torch.full((gain.shape[1],), 2.0, dtype=torch.float64)
    weight[0] = 1
    if width % 2 == 0:
        weight[-1] = 1
    return float((gain.double() ** 2 * weight).sum() / (gain.shape[0] * width))


PARAMS = st.builds(
    CNSParams,
    s_churn=st.floats(0, 2),
    power_gamma=st.floats(0.1, 3),
    gamma_divider=st.floats(0.1, 50),
    alpha_use_fnorm=st.booleans(),
    alpha_tilt_start=st.floats(-2, 2),
    alpha_tilt_end=st.floats(-2, 2),
    alpha_exp_interp=st.booleans(),
    alpha_exp_sharpness=st.floats(0.1, 10),
    num_freq_bins=st.integers(8, 128),
    energy_scale=st.floats(0.5, 1.5),
    formula=st.sampled_from(["endpoint", "authors"]),
    gamma_source=st.sampled_from(["matrix", "approximation", "reference"]),
)


@given(
    params=PARAMS,
    t=st.floats(0, 1),
    alpha=st.floats(-2, 2),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    row=st.sampled_from(["fit", "t", "ones", "zeros", "corner only"]),
)
@settings(max_examples=300, deadline=None)
def test_unit_variance_is_exact_at_every_setting_and_grid(params, t, alpha, height, width, row):
    bins = params.num_freq_bins
    gamma = {
        "fit": shipped_progress().at(t, bins),
        "t": torch.full((bins,), t),
        "ones": torch.ones(bins),
        "zeros": torch.zeros(bins),
        "corner only": torch.ones(bins).index_fill(0, torch.tensor([bins - 2]), 0.0),
    }[row]
    gain = spectral_gain(params, gamma, alpha, height, width)
    assert gain.shape == (height, width // 2 + 1)
    assert bool(gain.isfinite().all()) and bool((gain >= 0).all())
    assert full_mean_square(gain, width) == pytest.approx(1.0, abs=2e-6)


def test_where_everything_is_resolved_the_tilt_alone_remains():
    params = CNSParams(gamma_divider=0.5)
    resolved = spectral_gain(params, torch.ones(32), -0.7, 64, 64)
    tilt = spectral_gain(params, torch.zeros(32), -0.7, 64, 64)
    assert torch.equal(resolved, tilt)
    assert resolved.min() > 0.5


def test_the_endpoints_sentences():
    row = shipped_progress().at(0.6, 32)
    half = torch.full((32,), 0.6)

    def gain(gamma, alpha=0.0, **params):
        return spectral_gain(CNSParams(**params), gamma, alpha, 64, 64)

    # power_gamma: no effect under 'approximation'
    torch.testing.assert_close(gain(half, 0.3, power_gamma=0.1), gain(half, 0.3, power_gamma=3.0), rtol=0, atol=1e-6)
    # a larger divider tends to white
    distance = [float((gain(row, gamma_divider=d) - 1).abs().max()) for d in (1.0, 1.73, 5.0, 25.0, 50.0)]
    assert distance == sorted(distance, reverse=True) and distance[-1] < 0.01
    # a higher power concentrates more on unresolved (high) bands
    tops = [float(gain(row, power_gamma=p)[32, 32]) for p in (0.1, 0.75, 3.0)]
    assert tops == sorted(tops)
    # positive alpha raises high bands, negative low ones
    assert gain(half, 1.0)[32, 32] > 1 > gain(half, 1.0)[0, 0]
    assert gain(half, -1.0)[32, 32] < 1 < gain(half, -1.0)[0, 0]
    # without fnorm the tilt cancels
    assert torch.equal(gain(row, -1.0, alpha_use_fnorm=False), gain(row, 0.0))


def test_the_tilt_runs_from_start_to_end():
    for interp in (True, False):
        params = CNSParams(alpha_exp_interp=interp, alpha_tilt_start=0.4, alpha_tilt_end=-1.0)
        values = [alpha_tilt(params, i, 11) for i in range(11)]
        assert values[0] == 0.4 and values[-1] == pytest.approx(-1.0)
        assert values == sorted(values, reverse=True)
    assert alpha_tilt(CNSParams(alpha_exp_interp=False), 5, 11) == pytest.approx((0.15 - 0.5) / 2)
    k, p = 0.75, 0.5
    expected = 0.15 + (np.exp(k * p) - 1) / (np.exp(k) - 1) * (-0.65)
    assert alpha_tilt(CNSParams(), 5, 11) == pytest.approx(expected)
    assert alpha_tilt(CNSParams(), 0, 1) == 0.15


def test_patchify_is_the_layout_of_flux2():
    x = torch.arange(2 * 8 * 3 * 5.0).reshape(2, 8, 3, 5)
    grid = unpatchify(x, 2)
    for c, pi, pj, i, j in ((0, 0, 0, 0, 0), (1, 1, 0, 2, 4), (0, 1, 1, 1, 3)):
        assert grid[1, c, 2 * i + pi, 2 * j + pj] == x[1, 4 * c + 2 * pi + pj, i, j]
    assert torch.equal(patchify(grid, 2), x)
    assert unpatchify(x, 1) is x
    with pytest.raises(ValueError, match=r"\[2, 6, 3, 5\].*patch_size 2.*multiple of 4"):
        unpatchify(x[:, :6], 2)
    with pytest.raises(ValueError, match="multiples of 2"):
        patchify(torch.zeros(1, 1, 3, 4), 2)


def band_spectrum(noise, bins):
    """Measured power per band of [..., H, W] noise, over the full FFT grid."""
    power = torch.fft.fft2(noise.double(), norm="ortho").abs().square().flatten(0, -3).mean(0).numpy()
    height, width = power.shape
    fy, fx = np.fft.fftfreq(height).astype(np.float32), np.fft.fftfreq(width).astype(np.float32)
    radius = np.sqrt(fy[:, None] ** 2 + fx[None, :] ** 2)
    index = (radius / radius.max() * np.float32(bins - 1)).astype(int)
    count = np.bincount(index.ravel(), minlength=bins)
    return np.bincount(index.ravel(), power.ravel(), bins) / np.maximum(count, 1), count, index


@pytest.mark.parametrize("latent", [(32, 32), (24, 18), (19, 29)])
@pytest.mark.parametrize("alpha", [0.0, 1.5, -2.0])
def test_measured_noise_follows_beta_on_the_true_grid(latent, alpha, seed):
    params = CNSParams(power_gamma=1.5)
    gain = spectral_gain(params, shipped_progress().at(0.5, 32), alpha, 2 * latent[0], 2 * latent[1])
    white = torch.randn(64, 128, *latent, generator=torch.Generator().manual_seed(seed))
    colored = color_noise(white, gain, 2)
    assert colored.shape == white.shape and colored.dtype == white.dtype
    measured, count, index = band_spectrum(unpatchify(colored, 2), 32)
    half = index[:, : gain.shape[1]]
    beta2 = np.array([float(gain.double()[half == k].square().mean()) if count[k] else 0.0 for k in range(32)])
    draws = 64 * 32 * count  # a mode and its mirror are one draw of two degrees of freedom
    error = np.abs(measured - beta2)[count > 0]
    assert np.all(error < 6 * beta2[count > 0] * np.sqrt(2 / draws[count > 0]) + 1e-6)
    samples = white.numel()
    kurtosis_bound = 6 * np.sqrt(2 * (beta2**2 * count).sum() / count.sum() / samples)
    assert abs(float(colored.double().square().mean()) - 1) < kurtosis_bound


def test_the_packed_grid_would_fold_and_ours_does_not(seed):
    """Asked for α = -2, colouring the packed grid puts as much energy at the highest frequency as at DC."""
    tilt = CNSParams(formula="authors", power_gamma=1.0, gamma_divider=50.0)
    gamma = torch.zeros(32)
    # 2048 draws of each single mode: the bounds below are more than six standard errors
    white = torch.randn(64, 128, 32, 32, generator=torch.Generator().manual_seed(seed))
    ours = band_spectrum(unpatchify(color_noise(white, spectral_gain(tilt, gamma, -2.0, 64, 64), 2), 2), 32)[0]
    packed = band_spectrum(unpatchify(color_noise(white, spectral_gain(tilt, gamma, -2.0, 32, 32), 1), 2), 32)[0]
    assert packed[31] == pytest.approx(packed[0], rel=0.3)
    assert ours[31] / ours[0] == pytest.approx(np.exp(-4.0), rel=0.4)


def test_video_latents_are_coloured_over_their_last_two_axes(seed):
    white = torch.randn(2, 16, 3, 12, 10, generator=torch.Generator().manual_seed(seed))
    gain = spectral_gain(CNSParams(), shipped_progress().at(0.5, 32), -1.0, 12, 10)
    colored = color_noise(white, gain, 1)
    for frame in range(3):
        torch.testing.assert_close(colored[:, :, frame], color_noise(white[:, :, frame], gain, 1))


@pytest.mark.parametrize("shape", [(2, 128, 9, 14), (3, 12, 5, 5), (2, 4, 6, 7), (1, 52, 8, 3)])
def test_color_noise_is_the_filter_of_a_complex_fft(shape, seed):
    """Against ``fft2 · gain · ifft2`` in float64, one plane at a time; also for odd numbers of planes."""
    white = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    grid = unpatchify(white, 2).double().numpy()
    height, width = grid.shape[-2:]
    gain = spectral_gain(CNSParams(), shipped_progress().at(0.6, 32), -1.3, height, width).double().numpy()
    full = np.concatenate([gain, gain[:, 1 : (width + 1) // 2][:, ::-1]], axis=1)
    expected = np.fft.ifft2(np.fft.fft2(grid) * full)
    assert np.abs(expected.imag).max() < 1e-12
    found = unpatchify(color_noise(white, torch.from_numpy(gain).float(), 2), 2).numpy()
    np.testing.assert_allclose(found, expected.real, atol=2e-5)


@pytest.mark.parametrize("channels", [128, 20])
def test_coloured_noise_of_an_image_is_bit_equal_alone_and_in_a_batch(channels, seed):
    white = torch.randn(4, channels, 18, 13, generator=torch.Generator().manual_seed(seed))
    gain = spectral_gain(CNSParams(), shipped_progress().at(0.6, 32), -1.3, 36, 26)
    together = color_noise(white, gain, 2)
    for i in range(4):
        assert torch.equal(together[i : i + 1], color_noise(white[i : i + 1].clone(), gain, 2))
