"""Few steps on targets that are no Gaussian: a small form of benchmarks/fewsteps.py, with fixed seeds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from klein_cns.klein.schedules import SCHEDULES
from klein_cns.sampler import CNSParams, sample_cns

SOURCE = Path(__file__).resolve().parents[1] / "benchmarks" / "mixtures.py"
COUNT, SEED = 96, 7


def load_mixtures():
    spec = importlib.util.spec_from_file_location("benchmark_mixtures", SOURCE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mixtures = load_mixtures()


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(SEED)
    return mixtures.crops(mixtures.photographs(), 2000, generator)


@pytest.fixture(scope="module")
def mixture(data):
    generator = torch.Generator().manual_seed(SEED)
    return mixtures.mixture_target("pixels", mixtures.fit_mixture(data, 20, 16, generator))


def run(target, solver, schedule, steps):
    def model(x, sigma, **_):
        return target.denoised(x, sigma)

    sigmas = torch.from_numpy(SCHEDULES[schedule](steps, 4096))
    off = CNSParams(enable_cns=False)
    return sample_cns(model, mixtures.noise(COUNT, SEED), sigmas, disable=True, params=off, solver=solver)


def test_the_denoiser_is_the_posterior_mean(mixture):
    """What it leaves of x0 is orthogonal to x and to itself, within the scatter of samples."""
    everything = mixture.everything
    x0 = everything.sample(8_000, torch.Generator().manual_seed(SEED)).view(-1, *mixtures.SHAPE)
    for sigma in (0.3, 0.9):
        x = (1 - sigma) * x0 + sigma * mixtures.noise(len(x0), SEED + 1)
        predicted = everything.denoised(x, sigma)
        left = x0 - predicted
        for direction in (x, predicted):
            product = (left * direction).flatten(1).sum(1)
            assert abs(float(product.mean())) < 4 * float(product.std()) / len(x0) ** 0.5
        assert left.square().mean() < 0.9 * (x0 - x).square().mean()


def test_the_fine_ode_ends_in_the_target(mixture):
    """Its energy distance from exact samples is no more than that of other exact samples."""
    everything = mixture.everything
    truth = mixtures.fine_ode(mixture.denoised, mixtures.noise(COUNT, SEED), 100)
    white = mixtures.whitening(everything)
    exact = [everything.sample(COUNT, torch.Generator().manual_seed(seed)).view_as(truth) for seed in range(8)]
    scatter = max(abs(mixtures.energy_distance(a, b, white)) for a, b in zip(exact[::2], exact[1::2], strict=True))
    assert abs(mixtures.energy_distance(exact[0], truth, white)) < 2 * scatter


def test_twelve_steps_of_sde_3m_beat_euler_with_28_on_a_mixture(mixture):
    truth = mixtures.fine_ode(mixture.denoised, mixtures.noise(COUNT, SEED), 100)
    white = mixtures.whitening(mixture.everything)
    few, many = run(mixture, "sde_3m", "log_snr", 12), run(mixture, "euler", "flux2", 28)
    assert mixtures.deviation(few, truth) < 0.75 * mixtures.deviation(many, truth)
    assert mixtures.energy_distance(few, truth, white) < 0.25 * mixtures.energy_distance(many, truth, white)
    assert mixtures.band_error(few, truth) < 0.5 * mixtures.band_error(many, truth)


def test_twelve_steps_of_sde_3m_are_no_worse_than_euler_with_28_on_memorised_crops(data):
    target = mixtures.mixture_target("memorised", mixtures.points(data[:400]))
    truth = mixtures.fine_ode(target.denoised, mixtures.noise(COUNT, SEED), 100)
    few, many = run(target, "sde_3m", "log_snr", 12), run(target, "euler", "flux2", 28)
    assert mixtures.deviation(few, truth) <= mixtures.deviation(many, truth)


def test_the_metrics_are_zero_for_the_truth_and_unbiased():
    white = torch.eye(mixtures.SIZE)
    x, y, shifted = (mixtures.noise(COUNT, seed) for seed in (1, 2, 3))
    assert mixtures.energy_distance(x, x, white) == pytest.approx(0, abs=1e-3)
    assert mixtures.band_error(x, x) == mixtures.deviation(x, x) == 0
    far = mixtures.energy_distance(x, shifted + 0.3, white)
    assert abs(mixtures.energy_distance(x, y, white)) < 0.05 * far
    assert mixtures.band_error(1.1 * x, x) == pytest.approx(0.01, rel=1e-4)
    assert mixtures.deviation(1.1 * x, x) == pytest.approx(0.1, rel=1e-2)
