"""Sigmas of flow matching as numbers: checked, and as log signal-to-noise ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

SIGMA_ROUNDING = 1e-5  # above 1; shifted schedules begin there by a few units of float32


def as_numbers(sigmas: Tensor | Sequence[float]) -> list[float]:
    """The sigmas as floats, from a device in one transfer."""
    return sigmas.tolist() if isinstance(sigmas, Tensor) else [float(sigma) for sigma in sigmas]


def checked_sigmas(sigmas: Tensor | Sequence[float], what: str = "CNS") -> list[float]:
    """The sigmas as numbers in [0, 1]; a first sigma that only rounding puts above 1 becomes 1.

    >>> checked_sigmas([1.0000008, 0.5, 0.0])
    [1.0, 0.5, 0.0]

    Args:
        what: needs them, for the error.

    Raises:
        ValueError: the sigmas do not fall, or they leave the range from 0 to 1.
    """
    values = as_numbers(sigmas)
    falling = all(after <= before for before, after in pairwise(values))
    if not (falling and values[-1] >= 0.0 and 0.0 < values[0] <= 1.0 + SIGMA_ROUNDING):
        raise ValueError(
            f"the {len(values)} sigmas go from {values[0]:.7g} to {values[-1]:.7g}; {what} needs flow-matching sigmas "
            "that fall from at most 1, above 0, to at least 0. "
            f"Use a flow-matching model and its own scheduler, or turn {what} off."
        )
    return [min(value, 1.0) for value in values]


def log_snr(sigma: float) -> float:
    """λ = log((1-σ)/σ), half the log signal-to-noise ratio, for 0 < σ < 1.

    >>> log_snr(0.5)
    0.0
    """
    return math.log1p(-sigma) - math.log(sigma)
