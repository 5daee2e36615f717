"""Advice on settings that can hardly be meant, against what the solvers do to white noise."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from klein_cns.klein import flux2_sigmas, log_snr_sigmas
from klein_cns.sampler import CNSParams
from klein_cns.sampler.advice import advice
from klein_cns.sampler.solvers import SOLVERS, Step

KLEIN = flux2_sigmas(28, 4096).tolist()


def measured_surplus(params, sigmas, seed):
    """Steps at which the solver adds more variance than it takes away, from noise itself; x0 is 0 everywhere."""
    generator = torch.Generator().manual_seed(seed)
    eps, white = (torch.randn(1, 1, 128, 128, dtype=torch.float64, generator=generator) for _ in range(2))
    flat = torch.ones(128, 65)
    count = 0
    for sigma, sigma_next in pairwise(sigmas):
        if sigma_next == 0:
            continue
        x = sigma * eps
        quiet, loud = (
            SOLVERS[params.solver](
                x, torch.zeros_like(x),
                Step(sigma, sigma_next, params.s_churn, params.energy_scale, 1, source, flat, None),
            )
            for source in (torch.zeros_like(white), white)
        )  # fmt: skip
        count += float((loud - quiet).square().mean()) > float(x.square().mean() - quiet.square().mean())
    return count


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("churn", "energy"), [(2.0, 1.5), (2.0, 0.98), (1.0, 1.0), (0.5, 0.98), (0.5, 1.5), (1.2, 1.0)]
)
@pytest.mark.parametrize("sigmas", [KLEIN, log_snr_sigmas(8, 4096).tolist()], ids=["klein", "log_snr"])
def test_surplus_noise_is_counted_as_the_solver_makes_it(solver, churn, energy, sigmas, seed):
    params = CNSParams(solver=solver, s_churn=churn, energy_scale=energy, gamma_divider=25.0)
    said = [text for text in advice(params, sigmas, cfg=5.0) if "adds more noise than the model removes" in text]
    found = measured_surplus(params, sigmas, seed)
    counted = int(re.search(r"at (\d+) of", said[0])[1]) if said else 0
    assert abs(counted - found) <= 1  # a step on the border falls on either side of the sampling error
    assert not said or f"cns_s_churn {churn:g} with cns_energy_scale {energy:g}" in said[0]


def test_the_endpoints_defaults_and_presets_are_no_surplus():
    for params in (CNSParams(), CNSParams(gamma_divider=25.0, energy_scale=0.998)):
        assert not any("adds more noise" in text for text in advice(params, KLEIN, cfg=1.0))


def test_unguided_defaults_with_guidance_are_named():
    sentence = (
        "cns_gamma_divider 1.73 and cns_energy_scale 0.98 are meant for sampling without guidance, and cfg is 5; the "
        "endpoint advises 25 and 0.998 there."
    )
    assert advice(CNSParams(), KLEIN, cfg=5.0) == [sentence]
    for cfg in (None, 1.0, 0.5):
        assert advice(CNSParams(), KLEIN, cfg=cfg) == []
    for changed in (
        {"gamma_divider": 25.0}, {"energy_scale": 0.998}, {"gamma_source": "reference"},
        {"gamma_source": "approximation"}, {"enable_cns": False}, {"s_churn": 0.0},
    ):  # fmt: skip
        assert advice(CNSParams(**changed), KLEIN, cfg=5.0) == []


def test_without_injected_noise_nothing_is_said():
    assert advice(CNSParams(s_churn=2.0, energy_scale=1.5), [1.0, 0.0], cfg=1.0) == []
    assert advice(CNSParams(s_churn=0.0, energy_scale=1.5), KLEIN, cfg=5.0) == []
    assert advice(CNSParams(enable_cns=False, s_churn=2.0, energy_scale=1.5), KLEIN, cfg=5.0) == []
