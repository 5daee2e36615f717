"""Sigma schedules and sizes, against diffusers' own scheduler and figures written down here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from klein_cns.klein import IMAGE_SIZES, empirical_mu, flux2_sigmas, log_snr_sigmas
from klein_cns.klein.sizes import latent_size, output_size, parse_image_size

TOKENS = [16, 551, 4096, 4300, 4301, 9072, 16384]
STEPS = [1, 2, 4, 20, 28, 50, 200]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("steps", STEPS)
def test_flux2_has_the_bits_of_diffusers(tokens, steps):
    mu = compute_empirical_mu(tokens, steps)
    assert empirical_mu(tokens, steps) == pytest.approx(mu, rel=1e-12)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    assert torch.equal(torch.from_numpy(flux2_sigmas(steps, tokens)), scheduler.sigmas)


def test_known_shifts():
    assert empirical_mu(4096, 20) == pytest.approx(2.198, abs=5e-4)
    assert empirical_mu(5376, 20) == pytest.approx(1.367, abs=5e-4)  # 1344x1024
    assert 1 - flux2_sigmas(28, 4096)[14] == pytest.approx(0.10, abs=5e-3)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("steps", STEPS)
def test_log_snr_is_uniform_in_the_shifted_log_snr(tokens, steps):
    """Equal gaps in log((1-σ)/σ + c), c a tenth over klein's shift, from σ = 1 to three quarters of a step."""
    sigmas = log_snr_sigmas(steps, tokens)
    assert sigmas.dtype == np.float32
    sigmas = sigmas.astype(np.float64)
    assert len(sigmas) == steps + 1 and sigmas[0] == 1 and sigmas[-1] == 0 and np.all(np.diff(sigmas) < 0)
    if steps > 1:
        assert sigmas[-2] == pytest.approx(0.75 / steps, rel=1e-5)
        shift = np.exp(compute_empirical_mu(tokens, steps))
        gaps = np.diff(np.log((1 - sigmas[:-1]) / sigmas[:-1] + 0.1 / shift))
        rounding = 2**-24 / (sigmas * (1 - sigmas + 0.1 / shift * sigmas))[:-1]  # of float32, seen in that
        assert np.all(np.abs(gaps - gaps.mean()) <= 2 * (rounding[1:] + rounding[:-1]) + 1e-6)


def test_log_snr_keeps_kleins_first_step_and_half_its_steps_for_high_sigmas():
    sigmas = log_snr_sigmas(12, 4096)
    assert 1 - sigmas[1] == pytest.approx(1 - flux2_sigmas(12, 4096)[1], rel=0.05)
    assert (sigmas > 0.75).sum() == 6 and (sigmas[1:-1] < 0.25).sum() == 3


@pytest.mark.parametrize(
    ("value", "parsed"),
    [
        (None, "auto"),
        ("auto", "auto"),
        ("square_hd", "square_hd"),
        ("640x480", (640, 480)),
        ((64, 2048), (64, 2048)),
        ([100, 101], (100, 101)),
        ({"width": 2016, "height": 1152}, (2016, 1152)),
    ],
)
def test_image_size(value, parsed):
    assert parse_image_size(value) == parsed


@pytest.mark.parametrize(
    "value", ["huge", (63, 512), (512, 2049), (512.0, 512), (512,), {"width": 512}, 512, "512x", (True, 512)]
)
def test_a_bad_image_size_is_named(value):
    with pytest.raises(ValueError, match=r"image_size.*64 to 2048"):
        parse_image_size(value)


def test_output_size():
    assert output_size("auto", (451, 300)) == (451, 300)
    assert output_size("auto", (4000, 3000)) == (2048, 1536)
    assert output_size("auto", None) == (1024, 768)
    assert output_size("portrait_16_9", (451, 300)) == (576, 1024)
    with pytest.raises(ValueError, match=r"first picture is 1x1, .*at least 64 .*Give an image_size"):
        output_size("auto", (1, 1))
    assert set(IMAGE_SIZES) == {
        "square_hd",
        "square",
        "portrait_4_3",
        "portrait_16_9",
        "landscape_4_3",
        "landscape_16_9",
    }
    assert latent_size(451, 300) == (19, 29)
    assert latent_size(1024, 768) == (48, 64)
