"""The sigmas of CNS KSampler: klein's own schedules, and ComfyUI's."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import torch
from comfy_extras.nodes_flux import get_schedule

from ..klein.schedules import SCHEDULES
from ..sampler.params import checked_number

SCHEDULERS = (*SCHEDULES, *comfy.samplers.SCHEDULER_NAMES)
MAX_STEPS = 10_000
MAX_GRID = 1_000_000  # steps of a whole schedule, of which the last are run


def make_sigmas(model_sampling: Any, scheduler: str, steps: int, denoise: float, tokens: int) -> torch.Tensor:
    """float32 [steps + 1]; below denoise 1 the last steps + 1 sigmas of a schedule of int(steps / denoise).

    Args:
        model_sampling: the model's; ComfyUI's own schedules depend on it.
        scheduler: one of `SCHEDULERS`.
        tokens: positions of the latent, h times w; klein's schedules depend on it.

    Raises:
        ValueError: denoise is not a number from 0 to 1, or it is so small that no step is left.
    """
    if checked_number("denoise", denoise, 0.0, 1.0) == 0:
        return torch.FloatTensor([])
    nothing = ValueError(
        f"denoise is {denoise} with steps {steps}, which leaves nothing to do; raise it or set it to 0."
    )
    if steps / denoise > MAX_GRID:
        raise nothing
    total = int(steps / denoise)
    if scheduler == "flux2":
        sigmas = get_schedule(total, tokens)  # ComfyUI's own, for its bits
    elif scheduler in SCHEDULES:
        sigmas = torch.from_numpy(SCHEDULES[scheduler](total, tokens))
    else:
        sigmas = comfy.samplers.calculate_sigmas(model_sampling, scheduler, total).cpu()
    sigmas = sigmas[-(steps + 1) :]
    if len(sigmas) and sigmas[0] == 0:
        raise nothing
    return sigmas
