"""Coloured noise as k-diffusion's ``noise_sampler``: whose streams it takes, and what intervals share."""

from __future__ import annotations

import math

import pytest
import torch
from klein_cns.sampler import CNSParams, ColoredNoiseSampler, sample_cns
from klein_cns.sampler.noise import NoiseStreams

SIGMAS = [1.0, 0.9, 0.6, 0.3, 0.0]
WHITE = CNSParams(gamma_source="approximation", alpha_tilt_start=0, alpha_tilt_end=0, energy_scale=1)


def noises(params=WHITE, shape=(1, 4, 32, 32), sigmas=SIGMAS, **how):
    return ColoredNoiseSampler(params, sigmas, torch.zeros(shape), lambda sigma: 1 - sigma, **how)


def test_the_streams_are_those_of_cns_itself(seed):
    """White noise is what the stream of the same seed draws; coloured, it is what `sample_cns` adds."""
    white = NoiseStreams(seed, [0]).draw((1, 4, 32, 32), torch.device("cpu"))
    assert torch.allclose(noises(seed=seed)(1.0, 0.9), white, atol=1e-5)
    params = CNSParams(s_churn=1)
    x = torch.zeros(1, 128, 4, 6)
    two = torch.tensor([1.0, 0.9])
    added = sample_cns(lambda x, sigma: 0 * x, x, two, seed=seed, params=params, patch_size=2, disable=True)
    ours = noises(params, x.shape, [1.0, 0.9], patch_size=2, seed=seed)(1.0, 0.9)
    assert torch.allclose(added, ours * 0.9 * math.sqrt(1 - 0.9**2), atol=1e-5)


def test_an_image_is_the_same_alone_and_in_a_batch(seed):
    params = CNSParams()
    together = noises(params, (3, 4, 16, 16), seed=seed)
    alone = noises(params, (1, 4, 16, 16), seed=seed, batch_index=[2])
    for pair in ((1.0, 0.95), (1.0, 0.9), (0.9, 0.6)):
        assert torch.equal(together(*pair)[2:], alone(*pair))


def test_intervals_from_one_start_share_what_a_brownian_motion_shares(seed):
    """In any order of their lengths, also between two known ones; in several draws of many values."""
    shape = (1, 64, 64, 64)
    bound = 5 / math.sqrt(64**3)
    for ends in ((0.75, 0.6), (0.6, 0.75), (0.85, 0.6, 0.7), (0.6, 0.85, 0.7, 0.65)):
        noise = noises(shape=shape, seed=seed)
        drawn = [noise(0.9, end) for end in ends]
        for i, end in enumerate(ends):
            for j, other in enumerate(ends):
                short, long = sorted((0.9 - end, 0.9 - other))
                assert abs(float((drawn[i] * drawn[j]).mean()) - math.sqrt(short / long)) < 2 * bound, (end, other)
        assert torch.equal(noise(0.9, ends[0]), drawn[0])


def test_intervals_from_other_starts_share_nothing(seed):
    noise = noises(shape=(1, 64, 64, 64), seed=seed)
    drawn = [noise(*pair) for pair in ((0.9, 0.75), (0.75, 0.6), (0.9, 0.75), (0.9, 1.0), (0.6, 0.6), (0.6, 0.6))]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert abs(float((one * other).mean())) < 5 / math.sqrt(64**3)


def test_power_is_looked_up_by_time_and_the_tilt_by_the_position_in_the_schedule():
    """γ = t leaves the tilt alone, whose slope over the bands is α: given at the steps, and between two of them."""
    tilted = CNSParams(gamma_source="approximation", alpha_tilt_start=-1, alpha_tilt_end=2, alpha_exp_interp=False)
    noise = noises(tilted)
    for sigma, alpha in ((1.0, -1), (0.9, 0), (0.75, 0.5), (0.6, 1), (0.3, 2), (0.1, 2)):
        power = noise.power(sigma)
        assert float((power[-1] / power[0]).log()) == pytest.approx(alpha, abs=1e-9)


def test_rising_sigmas_are_refused():
    with pytest.raises(ValueError, match=r"CNS Noise needs .* sigmas that fall"):
        noises(sigmas=[1.0, 0.5, 0.7, 0.0])
