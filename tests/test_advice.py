"""Advice on settings that can hardly be meant, against the solvers' variances in closed form."""

from __future__ import annotations

from itertools import pairwise

import pytest
from klein_cns.klein import flux2_sigmas, log_snr_sigmas
from klein_cns.sampler import CNSParams
from klein_cns.sampler.advice import advice
from klein_cns.sampler.solvers import SOLVERS

KLEIN = flux2_sigmas(28, 4096).tolist()


def surplus(solver, churn, energy, sigma, sigma_next):
    """Whether a step injects more variance than it takes away, in closed form, for white noise and x0 = 0."""
    if solver == "euler":  # sigma'^2 c^2 e^2 (1 - q^2) against sigma^2 (1 - q^2)
        return (churn * energy * sigma_next) ** 2 > sigma**2
    rho = (sigma_next / sigma) ** (churn**2)
    return (energy * sigma_next) ** 2 * (1 - rho**2) > sigma**2 - (sigma_next * rho) ** 2


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("churn", "energy"), [(2.0, 1.5), (2.0, 0.98), (1.0, 1.0), (0.5, 0.98), (0.5, 1.5), (1.2, 1.0)]
)
@pytest.mark.parametrize("sigmas", [KLEIN, log_snr_sigmas(8, 4096).tolist()], ids=["klein", "log_snr"])
def test_surplus_noise_is_counted_as_the_solver_makes_it(solver, churn, energy, sigmas):
    params = CNSParams(s_churn=churn, energy_scale=energy, gamma_divider=25.0)
    steps = [pair for pair in pairwise(sigmas) if pair[1] > 0]
    count = sum(surplus(solver, churn, energy, *pair) for pair in steps)
    said = advice(params, solver, sigmas, cfg=5.0)
    if not count:
        assert said == []
    else:
        assert said == [
            f"cns_s_churn {churn:g} with cns_energy_scale {energy:g} adds more noise than the model removes, at "
            f"{count} of {len(steps)} steps; lower them, or the picture stays noisy."
        ]


def test_the_endpoints_defaults_and_presets_are_no_surplus():
    for params in (CNSParams(), CNSParams(gamma_divider=25.0, energy_scale=0.998)):
        assert not any("adds more noise" in text for text in advice(params, "euler", KLEIN, cfg=1.0))


def test_unguided_defaults_with_guidance_are_named():
    sentence = (
        "cns_gamma_divider 1.73 and cns_energy_scale 0.98 are meant for sampling without guidance, and cfg is 5; the "
        "endpoint advises 25 and 0.998 there."
    )
    assert advice(CNSParams(), "euler", KLEIN, cfg=5.0) == [sentence]
    for cfg in (None, 1.0, 0.5):
        assert advice(CNSParams(), "euler", KLEIN, cfg=cfg) == []
    for changed in (
        {"gamma_divider": 25.0}, {"energy_scale": 0.998}, {"gamma_source": "reference"},
        {"gamma_source": "approximation"}, {"enable_cns": False}, {"s_churn": 0.0},
    ):  # fmt: skip
        assert advice(CNSParams(**changed), "euler", KLEIN, cfg=5.0) == []


def test_without_injected_noise_nothing_is_said():
    assert advice(CNSParams(s_churn=2.0, energy_scale=1.5), "euler", [1.0, 0.0], cfg=1.0) == []
    assert advice(CNSParams(s_churn=0.0, energy_scale=1.5), "euler", KLEIN, cfg=5.0) == []
    assert advice(CNSParams(enable_cns=False, s_churn=2.0, energy_scale=1.5), "euler", KLEIN, cfg=5.0) == []
