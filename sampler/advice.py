"""Settings that are allowed and can hardly be meant, in sentences for the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise

import torch

from .params import GUIDED_DIVIDER, GUIDED_ENERGY, CNSParams, public_name
from .solvers import Step, find_solver

DEFAULTS = {spec.name: spec.default for spec in fields(CNSParams)}


def advice(params: CNSParams, solver: str, sigmas: Sequence[float], cfg: float | None = None) -> list[str]:
    """One sentence for each setting of a run that can hardly be meant; empty for most runs.

    >>> advice(CNSParams(), "euler", [1.0, 0.5, 0.0])
    []

    Args:
        params: say what noise the run adds.
        solver: names an entry of `SOLVERS`.
        sigmas: [steps + 1], fall within 1 to 0.
        cfg: guides the run; None where the guidance is unknown.

    Returns:
        sentences that name the setting, its value and what to do.
    """
    if params.active_churn == 0:
        return []
    found = []
    injected = [pair for pair in pairwise(sigmas) if pair[1] > 0]
    surplus = [pair for pair in injected if _exceeds(params, solver, *pair)]
    if surplus:
        found.append(
            f"cns_s_churn {params.s_churn:g} with cns_energy_scale {params.energy_scale:g} adds more noise than the "
            f"model removes, at {len(surplus)} of {len(injected)} steps; lower them, or the picture stays noisy."
        )
    return found + guidance_advice(params, cfg)


def guidance_advice(params: CNSParams, cfg: float | None) -> list[str]:
    """A sentence where the defaults for sampling without guidance meet guidance, see `advice`."""
    unguided = ("gamma_divider", "energy_scale")
    if (
        cfg is not None
        and cfg > 1
        and params.gamma_source == "matrix"
        and all(getattr(params, name) == DEFAULTS[name] for name in unguided)
    ):
        values = " and ".join(f"{public_name(name)} {getattr(params, name):g}" for name in unguided)
        return [
            f"{values} are meant for sampling without guidance, and cfg is {cfg:g}; the endpoint advises "
            f"{GUIDED_DIVIDER:g} and {GUIDED_ENERGY:g} there."
        ]
    return []


def _exceeds(params: CNSParams, solver: str, sigma: float, sigma_next: float) -> bool:
    """Whether a step adds more noise variance than it takes away: its response to unit noise, as the solver has it."""

    def response(x: float, white: float) -> float:
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64, device="cpu")
        gain = torch.ones(1, 1, device="cpu")
        step = Step(sigma, sigma_next, params.s_churn, params.energy_scale, 1, white * one, gain, ())
        return float(find_solver(solver).step(x * one, 0 * one, step))

    return response(0.0, 1.0) ** 2 > sigma**2 - response(sigma, 0.0) ** 2
