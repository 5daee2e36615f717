"""Settings that are allowed and can hardly be meant, in sentences for the user."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise

from .params import GUIDED_DIVIDER, GUIDED_ENERGY, CNSParams, public_name

DEFAULTS = {spec.name: spec.default for spec in fields(CNSParams)}


def advice(params: CNSParams, sigmas: Sequence[float], cfg: float | None = None) -> list[str]:
    """One sentence for each setting of a run that can hardly be meant; empty for most runs.

    Args:
        sigmas: [steps + 1] of the run, falling, in [0, 1].
        cfg: the guidance of the run; None where it is unknown.
    """
    if not params.enable_cns or params.s_churn == 0:
        return []
    found = []
    injected = [pair for pair in pairwise(sigmas) if pair[1] > 0]
    surplus = [pair for pair in injected if _added(params, *pair) > _removed(params, *pair)]
    if surplus:
        found.append(
            f"cns_s_churn {params.s_churn:g} with cns_energy_scale {params.energy_scale:g} adds more noise than the "
            f"model removes, at {len(surplus)} of {len(injected)} steps; lower them, or the picture stays noisy."
        )
    unguided = ("gamma_divider", "energy_scale")
    if (
        cfg is not None
        and cfg > 1
        and params.gamma_source == "matrix"
        and all(getattr(params, name) == DEFAULTS[name] for name in unguided)
    ):
        values = " and ".join(f"{public_name(name)} {getattr(params, name):g}" for name in unguided)
        found.append(
            f"{values} are meant for sampling without guidance, and cfg is {cfg:g}; the endpoint advises "
            f"{GUIDED_DIVIDER:g} and {GUIDED_ENERGY:g} there."
        )
    return found


def _added(params: CNSParams, sigma: float, sigma_next: float) -> float:
    """Variance of the noise that a step of the solver injects, for white noise."""
    if params.solver == "euler":
        kept = sigma_next / sigma
        return (params.energy_scale * params.s_churn * sigma_next) ** 2 * (1 - kept**2)
    return (params.energy_scale * sigma_next) ** 2 * (1 - _rho(params, sigma, sigma_next) ** 2)


def _removed(params: CNSParams, sigma: float, sigma_next: float) -> float:
    """Variance of the noise that the step takes away, for an exact model."""
    if params.solver == "euler":
        return sigma**2 - sigma_next**2
    return sigma**2 - (sigma_next * _rho(params, sigma, sigma_next)) ** 2


def _rho(params: CNSParams, sigma: float, sigma_next: float) -> float:
    """Share of the predicted noise that `solvers.sde` keeps, for white noise."""
    return math.exp(params.s_churn**2 * math.log(sigma_next / sigma))
