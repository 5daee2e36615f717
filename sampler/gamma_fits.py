"""Fitted models of the two γ matrices that the authors published.

Source of what was fitted: ``gamma_matrix/`` of HadarDavidson/colored-noise-sampling (Davidson,
Issachar, Benaim, arXiv:2605.30332), measured on SiT-XL/2 at ImageNet 256. The model and its
coefficients are ours.

Against the published matrices the rms error is 0.0177 (unguided) and 0.0170 (guidance 1.5). Nearly all
of it lies in their first ten rows, a start-up transient in which γ first falls: progress cannot, so the
model is 0 there. On the rows after it the rms error is 0.009 and 0.008.
"""

from __future__ import annotations

import numpy as np

BINS = 32
UNGUIDED, GUIDED = "sit_xl2_unguided", "sit_xl2_cfg_1.5"
KNEE = 0.2  # normalised radius below which bands count as low

# a, p, q, c: polynomials in the warped frequency x, lowest power first; the last entry is added in the corner
# band alone (f = 1), which holds a single FFT mode. gate: flow time where the transient ends, and its steepness.
FITS: dict[str, dict[str, tuple[float, ...]]] = {
    UNGUIDED: {
        "a": (0.588, -0.3427, 1.3655, -0.8469, -0.264),
        "p": (1.6973, 0.9683, -0.0389, -0.4054, -0.1927),
        "q": (1.18, -0.187, -0.3245),
        "c": (0.1351, 0.0713),
        "gate": (0.0386, 96.0),
    },
    GUIDED: {
        "a": (0.5208, -0.4355, 1.3497, -0.7592, -0.2937),
        "p": (1.5829, 0.8534, 0.002, -0.3153, -0.2241),
        "q": (1.1826, -0.1818, -0.2981),
        "c": (0.1375, 0.0755),
        "gate": (0.0345, 96.0),
    },
}


def fitted_gamma(t: np.ndarray, fit: dict[str, tuple[float, ...]], bins: int = BINS) -> np.ndarray:
    """``γ = gate(t) · (1 - (1-c)·(1-t)^q / (e^a·t^p + (1-t)^q))``, rising in t from 0 to 1.

    >>> fitted_gamma(np.array([0.0, 1.0]), FITS["sit_xl2_unguided"])[:, 0].round(3).tolist()
    [0.0, 1.0]

    Args:
        t: float64 [rows], gives the flow times in [0, 1].
        fit: gives the coefficients, an entry of ``FITS``.
        bins: counts the bands; band k lies at the normalised radius f = k / (bins - 1).

    Returns:
        float64 [rows, bins].
    """
    t = t[:, None]
    f = np.linspace(0.0, 1.0, bins)
    x = 2.0 * np.log1p(f / KNEE) / np.log1p(1.0 / KNEE) - 1.0
    a, p, q, c = (np.polynomial.polynomial.polyval(x, fit[k][:-1]) + (f == 1.0) * fit[k][-1] for k in "apqc")
    resolved, open_ = np.exp(a) * t**p, (1.0 - t) ** q
    end, steepness = fit["gate"]
    gate = t**steepness / (t**steepness + end**steepness)
    return gate * (1.0 - (1.0 - c) * open_ / (resolved + open_))
