"""The solvers: each one pure function ``(x, denoised, step) -> x at sigma_next``.

Flow matching: ``x_σ = (1-σ)·x0 + σ·ε``; ``denoised`` is the (guided) prediction of x0 at ``step.sigma``. Both are
[B, C, ..., h, w] of one floating dtype, and so is the result.

A new solver is one more function here and its line in `SOLVERS`; widgets, options and help are made from that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .sigmas import log_snr
from .spectrum import color_noise

HISTORY = 2  # predictions of earlier steps that a solver may look at
LOG_SNR_FLOOR = 0.003  # of (1-σ)/σ in `sde_3m`


class Step(NamedTuple):
    """One step of a schedule, with 1 >= sigma > 0 and sigma >= sigma_next > 0."""

    sigma: float
    sigma_next: float
    s_churn: float
    energy_scale: float
    patch_size: int
    white: Tensor  # [B, C, h, w] unit noise; empty where s_churn is 0
    gain: Tensor  # [H, W // 2 + 1] on the unpatchified grid; empty where s_churn is 0
    previous: Sequence[tuple[Tensor, float]]  # denoised and sigma of up to `HISTORY` higher sigmas, the latest first


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
    std = _euler_std(step.sigma, step.sigma_next, step.s_churn)
    return x + std * step.energy_scale * color_noise(step.white, step.gain, step.patch_size).to(x.dtype)


def euler_variance(sigma: float, sigma_next: float, s_churn: float, power: Tensor) -> Tensor:
    """The noise variance of `euler` where the noise has this power."""
    return _euler_std(sigma, sigma_next, s_churn) ** 2 * power


def _euler_std(sigma: float, sigma_next: float, s_churn: float) -> float:
    return s_churn * sigma_next * math.sqrt(1.0 - (sigma_next / sigma) ** 2)


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


def sde_variance(sigma: float, sigma_next: float, s_churn: float, power: Tensor) -> Tensor:
    """The noise variance of `sde`, ``σ'²·(1-ρ²)``, where the noise has this power."""
    return -(sigma_next**2) * torch.expm1(2 * s_churn**2 * math.log(sigma_next / sigma) * power)


def sde_2m(x: Tensor, denoised: Tensor, step: Step) -> Tensor:
    """`sde` with x0 extrapolated in ``λ = log((1-σ)/σ)``, the multistep of DPM-Solver++(2M), arXiv:2211.01095.

    First order where λ of the step or of the one before is infinite (σ = 1), and where there is none before.
    """
    if step.previous:
        previous, sigma_before = step.previous[0]
        if sigma_before < 1.0:
            lam = log_snr(step.sigma)
            ratio = (log_snr(step.sigma_next) - lam) / (lam - log_snr(sigma_before))
            denoised = denoised + 0.5 * ratio * (denoised - previous)
    return sde(x, denoised, step)


def sde_3m(x: Tensor, denoised: Tensor, step: Step) -> Tensor:
    """`sde` with x0 extrapolated by the parabola through this step's prediction and the two before.

    The ODE is ``d(x/σ) = x0·du`` with ``u = (1-σ)/σ``, so a step needs the mean of x0 over its du. In
    ``τ = log(u + 0.003)`` du is ``e^τ·dτ``. With h the step in τ, h₁ the one before, s = τ - τ(σ) and Newton's divided
    differences, the mean is

        x0 + E[s]·x0[0, 1] + (E[s²] + h₁·E[s])·x0[0, 1, 2],  E[s] = h/(1-e^-h) - 1,  E[s²] = h²/(1-e^-h) - 2·E[s]

    This is the exponential Adams-Bashforth method of third order, which SA-Solver (arXiv:2309.05019) without noise is
    in λ = log u. The 0.003 makes σ = 1, where λ is infinite, a point like any other; below σ = 0.9 the two differ by
    less than 0.03. The order is lower while there are fewer predictions before.
    """
    values = [denoised, *(value for value, _ in step.previous)]
    taus = [_tau(step.sigma), *(_tau(sigma) for _, sigma in step.previous)]
    h = _tau(step.sigma_next) - taus[0]
    if h > 0 and len(taus) > 1:
        first = h / -math.expm1(-h) - 1
        slope = (values[0] - values[1]) / (taus[0] - taus[1])
        denoised = denoised + first * slope
        if len(taus) > 2:
            second = h**2 / -math.expm1(-h) - 2 * first
            bend = (slope - (values[1] - values[2]) / (taus[1] - taus[2])) / (taus[0] - taus[2])
            denoised = denoised + (second + (taus[0] - taus[1]) * first) * bend
    return sde(x, denoised, step)


def _tau(sigma: float) -> float:
    """log((1-σ)/σ + 0.003): `log_snr`, but finite at σ = 1."""
    return math.log((1.0 - sigma) / sigma + LOG_SNR_FLOOR)


class Solver(NamedTuple):
    """An entry of `SOLVERS`.

    Attributes:
        step: makes x at ``sigma_next``.
        help: tells a user what it does.
        plain: whether it is the official chain where no noise is injected; the run then takes that chain's own Euler
            steps, bit for bit.
        variance: of the noise that a step adds at energy_scale 1, from (sigma, sigma_next, s_churn, power β²); in the
            shape of the power. It is what the browser draws.
    """

    step: Callable[[Tensor, Tensor, Step], Tensor]
    help: str
    plain: bool = False
    variance: Callable[[float, float, float, Tensor], Tensor] = sde_variance


SOLVERS = {
    "euler": Solver(euler, "a step and then noise, as the endpoint does", plain=True, variance=euler_variance),
    "sde": Solver(sde, "the paper's SDE, exactly", plain=True),
    "sde_2m": Solver(sde_2m, "the SDE with a second-order prediction; without noise the second-order ODE"),
    "sde_3m": Solver(sde_3m, "the SDE with a third-order prediction, for few steps; without noise the third-order ODE"),
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
