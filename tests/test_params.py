"""CNSParams: what the endpoint documents is the oracle."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
from endpoint_facts import BOTH, complete_request
from klein_cns.sampler import CNSParams
from klein_cns.sampler.params import public_name

NUMBERS = [spec for spec in fields(CNSParams) if "min" in spec.metadata]
CHOICES = [spec for spec in fields(CNSParams) if "options" in spec.metadata]


def test_names_order_defaults_and_ranges_are_the_endpoints():
    documented = {name: facts for name, facts in BOTH.items() if name.startswith("cns_")}
    own = {public_name(spec.name): spec for spec in fields(CNSParams)}
    assert list(own) == ["enable_cns", *documented, "cns_formula"]
    for name, (kind, default, allowed) in documented.items():
        spec = own[name]
        assert spec.default == default and type(spec.default) is kind
        if "min" in spec.metadata:
            assert (spec.metadata["min"], spec.metadata["max"]) == allowed
        elif "options" in spec.metadata:
            options = spec.metadata["options"]
            assert tuple(value for value in options if value not in spec.metadata["local"]) == allowed
        else:
            assert allowed is None


def test_a_complete_request_is_read_and_has_cns_off():
    request = complete_request("a.png")
    params = CNSParams.from_endpoint(request)
    assert not params.enable_cns  # every cns_ value is given, and enable_cns is left out
    given = {name: value for name, value in request.items() if name.startswith("cns_")}
    assert len(given) == 11 and {name: params.to_endpoint()[name] for name in given} == given


@pytest.mark.parametrize("spec", NUMBERS, ids=lambda spec: spec.name)
def test_limits_are_allowed_and_nothing_beyond(spec):
    low, high = spec.metadata["min"], spec.metadata["max"]
    for value in (low, high):
        assert getattr(CNSParams(**{spec.name: value}), spec.name) == value
    beyond = 1 if isinstance(spec.default, int) else 1e-9
    for value in (low - beyond, high + beyond, math.nan, math.inf, -math.inf, "0.5", None, True, [1]):
        with pytest.raises(ValueError, match=rf"^cns_{spec.name} is .*allowed is .*{low} to {high}"):
            CNSParams(**{spec.name: value})


@pytest.mark.parametrize("spec", CHOICES, ids=lambda spec: spec.name)
def test_choices(spec):
    for value in spec.metadata["options"]:
        assert getattr(CNSParams(**{spec.name: value}), spec.name) == value
    for value in ("", "Euler", None, 1):
        with pytest.raises(ValueError, match=rf"^cns_{spec.name} is .*allowed are {spec.metadata['options'][0]}"):
            CNSParams(**{spec.name: value})


@pytest.mark.parametrize("name", ["enable_cns", "alpha_use_fnorm", "alpha_exp_interp"])
@pytest.mark.parametrize("value", [1, 0, "true", None])
def test_flags_are_booleans(name, value):
    with pytest.raises(ValueError, match=rf"{name} is .*allowed are true and false"):
        CNSParams(**{name: value})


def test_numbers_of_other_libraries_and_whole_numbers_for_floats():
    params = CNSParams(s_churn=1, gamma_divider=np.float32(2.0), num_freq_bins=np.int64(64))
    assert (params.s_churn, params.gamma_divider, params.num_freq_bins) == (1.0, 2.0, 64)
    assert [type(getattr(params, n)) for n in ("s_churn", "gamma_divider", "num_freq_bins")] == [float, float, int]
    with pytest.raises(ValueError, match="cns_num_freq_bins is 32.5"):
        CNSParams(num_freq_bins=32.5)


def test_from_endpoint_reads_cns_and_ignores_the_rest():
    request = {"prompt": "x", "seed": 3, "enable_cns": True, "cns_s_churn": 1, "cns_formula": "authors"}
    assert CNSParams.from_endpoint(request) == CNSParams(s_churn=1.0, formula="authors")
    assert CNSParams.from_endpoint({}) == CNSParams(enable_cns=False)
    with pytest.raises(ValueError, match="unknown CNS parameter cns_churn; known are .*cns_s_churn"):
        CNSParams.from_endpoint({"cns_churn": 1})
    with pytest.raises(ValueError, match="cns_s_churn is 3.0"):
        CNSParams.from_endpoint({"enable_cns": False, "cns_s_churn": 3.0})


def test_round_trips():
    params = CNSParams(s_churn=1.25, alpha_use_fnorm=False, num_freq_bins=9)
    assert CNSParams.from_endpoint(params.to_endpoint()) == params
    local = CNSParams(formula="authors", gamma_source="reference")
    assert CNSParams.from_endpoint(local.to_request()) == local


@pytest.mark.parametrize(
    ("local", "says"),
    [
        ({"gamma_source": "reference"}, "cns_gamma_source='reference' .*'matrix', 'approximation'"),
        ({"formula": "authors"}, "cns_formula='authors' .*'endpoint'"),
    ],
)
def test_what_the_endpoint_cannot_do_is_said(local, says):
    with pytest.raises(ValueError, match=says):
        CNSParams(**local).to_endpoint()
