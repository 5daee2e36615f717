"""The solvers: each one pure function ``(x, denoised, step) -> x at sigma_next``.

Flow matching: ``x_σ = (1-σ)·x0 + σ·ε``; ``denoised`` is the (guided) prediction of x0 at ``step.sigma``. Both are
[B, C, ..., h, w] of one floating dtype, and so is the result.

A new solver is one more function here and its line in `SOLVERS`; widgets, options and help are made from that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .spectrum import color_noise


class Step(NamedTuple):
    """One step of a schedule, with 1 >= sigma > 0 and sigma >= sigma_next > 0."""

    sigma: float
    sigma_next: float
    s_churn: float
    energy_scale: float
    patch_size: int
    white: Tensor  # [B, C, h, w] unit noise; empty where s_churn is 0
    gain: Tensor  # [H, W // 2 + 1] on the unpatchified grid; empty where s_churn is 0
    previous: tuple[Tensor, float] | None  # denoised and sigma of the step before


def ode_euler(x: Tensor, denoised: Tensor, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
    """A plain Euler step of the probability-flow ODE, in the order of operations of k-diffusion's ``sample_euler``.

    >>> ode_euler(torch.tensor([1.0]), torch.tensor([0.0]), 1.0, 0.5)
    tensor([0.5000])
    """
    d = (x - denoised) / sigma
    return x + d * (sigma_next - sigma)


def euler(x: Tensor, denoised: Tensor, step: Step) -> Tensor:
    """A full Euler step, then ``s_churn · σ'·sqrt(1-(σ'/σ)²)`` of coloured noise (the endpoint's CNS)."""
    x = ode_euler(x, denoised, step.sigma, step.sigma_next)
    std = step.s_churn * step.sigma_next * math.sqrt(1.0 - (step.sigma_next / step.sigma) ** 2)
    return x + std * step.energy_scale * color_noise(step.white, step.gain, step.patch_size).to(x.dtype)


def sde(x: Tensor, denoised: Tensor, step: Step) -> Tensor:
    """The paper's SDE with diffusion ``s_churn²·σ·β²``, exact for a constant x0.

    Per band ``ρ = (σ'/σ)^{s_churn²·β²}`` and ``x' = (1-σ')·x0 + σ'·(ρ·ε̂ + sqrt(1-ρ²)·ξ)`` with the
    predicted noise ``ε̂ = (x-(1-σ)·x0)/σ`` and white ξ.
    """
    eps = (x - (1.0 - step.sigma) * denoised) / step.sigma
    if step.s_churn > 0:
        log_rho = step.s_churn**2 * math.log(step.sigma_next / step.sigma) * step.gain**2
        kept = color_noise(eps, torch.exp(log_rho), step.patch_size)
        fresh = color_noise(step.white, torch.sqrt(-torch.expm1(2.0 * log_rho)), step.patch_size)
        eps = kept + step.energy_scale * fresh.to(kept.dtype)
    return (1.0 - step.sigma_next) * denoised + step.sigma_next * eps


def sde_2m(x: Tensor, denoised: Tensor, step: Step) -> Tensor:
    """`sde` with x0 extrapolated in ``λ = log((1-σ)/σ)``, the multistep of DPM-Solver++(2M), arXiv:2211.01095.

    First order where λ of the step or of the one before is infinite (σ = 1), and where there is none before.
    """
    if step.previous is not None:
        previous, sigma_before = step.previous
        if sigma_before < 1.0 and step.sigma < sigma_before:
            lam = log_snr(step.sigma)
            ratio = (log_snr(step.sigma_next) - lam) / (lam - log_snr(sigma_before))
            denoised = denoised + 0.5 * ratio * (denoised - previous)
    return sde(x, denoised, step)


def log_snr(sigma: float) -> float:
    """λ = log((1-σ)/σ), half the log signal-to-noise ratio, for 0 < σ < 1.

    >>> log_snr(0.5)
    0.0
    """
    return math.log1p(-sigma) - math.log(sigma)


class Solver(NamedTuple):
    """An entry of `SOLVERS`.

    Attributes:
        step: makes x at ``sigma_next``.
        help: tells a user what it does.
        plain: whether it is the official chain where no noise is injected; the run then takes that chain's own Euler
            steps, bit for bit.
    """

    step: Callable[[Tensor, Tensor, Step], Tensor]
    help: str
    plain: bool = False


SOLVERS = {
    "euler": Solver(euler, "a step and then noise, as the endpoint does", plain=True),
    "sde": Solver(sde, "the paper's SDE, exactly", plain=True),
    "sde_2m": Solver(sde_2m, "the SDE with a second-order prediction; without noise the second-order ODE"),
}
DEFAULT_SOLVER = "euler"
SOLVER_HELP = (
    "How a step is made: " + "; ".join(f"'{name}' {solver.help}" for name, solver in SOLVERS.items()) + ". "
    "Without Colored Noise Sampling, or at churn 0, the plain ones are the official Euler chain."
)


def find_solver(name: str) -> Solver:
    """The entry of ``name``.

    >>> find_solver("euler").plain
    True

    Raises:
        ValueError: there is no such solver; the message lists them.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver is {name!r}; allowed are {', '.join(SOLVERS)}.")
    return SOLVERS[name]
