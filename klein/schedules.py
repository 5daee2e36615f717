"""Sigma schedules of klein, as functions of the step count and the latent's size."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

LOG_SNR_LAST = 0.75  # the last sigma above 0 of `log_snr_sigmas`, times its steps
LOG_SNR_OFFSET = 0.1  # what `log_snr_sigmas` adds to (1-σ)/σ, times the shift


def empirical_mu(tokens: int, steps: int) -> float:
    """The shift of FLUX.2's schedule (``compute_empirical_mu`` of the FLUX.2 reference code).

    >>> round(empirical_mu(4096, 28), 2)
    2.15

    Args:
        tokens: counts the target latent alone, height/16 x width/16.
        steps: counts the whole schedule.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * steps + (at_200 - 200.0 * slope)


def flux2_sigmas(steps: int, tokens: int) -> np.ndarray:
    """klein's own schedule: a line from 1 to 0, shifted by `empirical_mu`.

    It takes the float32 operations of diffusers' ``set_timesteps``, so that both give the same bits.

    >>> flux2_sigmas(4, 4096).shape
    (5,)

    Returns:
        float32 [steps + 1], from 1 to 0.
    """
    shift = math.exp(empirical_mu(tokens, steps))
    line = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    return np.append(shift / (shift + (1 / line - 1)), np.float32(0.0))


def log_snr_sigmas(steps: int, tokens: int) -> np.ndarray:
    """For few steps: uniform in ``log(u + c)`` with ``u = (1-σ)/σ``, from 1 to 0.75/steps, then 0.

    Below σ = 0.9 that is uniform in λ = log u, in which a denoiser changes evenly; c = 0.1/shift with `flux2_sigmas`'s
    shift makes it begin at 1, where λ is infinite, and keeps steps at the highest sigmas, where the composition is
    decided. docs/fewsteps.md has what it was measured on.

    >>> [round(float(sigma), 3) for sigma in log_snr_sigmas(4, 4096)]
    [1.0, 0.938, 0.639, 0.188, 0.0]

    Returns:
        float32 [steps + 1].
    """
    if steps == 1:
        return np.array([1.0, 0.0], dtype=np.float32)
    offset = LOG_SNR_OFFSET / math.exp(empirical_mu(tokens, steps))
    last = LOG_SNR_LAST / steps
    line = np.linspace(math.log(offset), math.log((1 - last) / last + offset), steps)
    inner = 1 / (1 + np.exp(line[1:]) - offset)
    return np.concatenate([[1.0], inner, [0.0]]).astype(np.float32)


SCHEDULES: dict[str, Callable[[int, int], np.ndarray]] = {"flux2": flux2_sigmas, "log_snr": log_snr_sigmas}
