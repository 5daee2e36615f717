"""The flow time of a sigma, by the model's own parametrisation."""

from __future__ import annotations

from typing import Any

from comfy.model_sampling import CONST


def flow_time(model_sampling: Any, sigma: float) -> float:
    """Flow time t in [0, 1] of a model's sigma: 0 is noise, 1 the picture.

    A flow model (``CONST``) has ``x = (1-σ)·x0 + σ·ε`` and ``t = 1-σ``. The others have ``x = x0 + σ·ε``, which divided
    by ``1+σ`` is the same with ``σ/(1+σ)`` in place of σ, and so ``t = 1/(1+σ)``.

    Args:
        model_sampling: the model's ``model_sampling``.
        sigma: as its samplers have it, 0 or more.
    """
    if isinstance(model_sampling, CONST):
        return min(max(1.0 - sigma, 0.0), 1.0)
    return 1.0 / (1.0 + sigma)
