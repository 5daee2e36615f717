"""What a run's settings do, as numbers to draw: the noise's colour, γ, and how much is added at each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .params import CNSParams
from .progress import ProgressMatrix, resolve_progress
from .sampling import power_table
from .solvers import find_solver
from .spectrum import radial_bands

MOST_COLUMNS = 200  # steps that are shown; of a longer schedule every so many


class NoiseView(NamedTuple):
    """A run in numbers. With S steps shown of a schedule, and B bands:

    Attributes:
        sigmas: [steps + 1], the whole schedule.
        steps: [S], which of its steps are shown, counted from 0.
        power: float64 [S, B], β²: the noise's power, 1 where it is white.
        gamma: float64 [S, B], how far each band is resolved.
        std: float64 [S], of the noise that is added, over all bands; 0 at a step to sigma 0.
        wavelengths: float64 [B], of each band's middle, in pixels of the picture; infinite for what is flat.
        modes: float64 [B], how many modes of the grid a band has; one without any adds nothing.
    """

    sigmas: list[float]
    steps: list[int]
    power: Tensor
    gamma: Tensor
    std: Tensor
    wavelengths: Tensor
    modes: Tensor


def noise_view(
    params: CNSParams,
    sigmas: Sequence[float],
    grid: tuple[int, int],
    *,
    solver: str,
    progress: ProgressMatrix | None,
    cell: float,
) -> NoiseView:
    """The numbers of a run that injects noise.

    >>> view = noise_view(CNSParams(), [1.0, 0.5, 0.0], (8, 8), solver="euler", progress=None, cell=8)
    >>> view.power.shape, [round(float(std), 3) for std in view.std]
    (torch.Size([2, 32]), [0.212, 0.0])

    Args:
        params: say how the noise is coloured and how much of it is added.
        sigmas: [steps + 1], fall within 1 to 0.
        grid: gives (height, width) of the unpatchified latent.
        solver: names an entry of `SOLVERS`.
        progress: as of `CNSRun`.
        cell: gives the pixels of a grid cell's side.

    Raises:
        ValueError: as `CNSRun`.
    """
    progress = resolve_progress(params, progress)
    bins, sigmas = params.num_freq_bins, list(sigmas)
    _, modes = radial_bands(*grid, bins)
    steps = _shown(len(sigmas) - 1)
    power = power_table(params, progress, sigmas, modes, steps)
    gamma = torch.stack([progress.at(1.0 - sigmas[i], bins).double() for i in steps])
    pairs = list(pairwise(sigmas))
    std = torch.tensor([_std(params, solver, pairs[i], row, modes) for i, row in zip(steps, power, strict=True)])
    return NoiseView(sigmas, steps, power, gamma, std.double(), cell / band_radius(*grid, bins), modes)


def band_radius(height: int, width: int, num_bins: int) -> Tensor:
    """Radius of the middle of each band of `radial_bands`, in cycles a cell: float64 [num_bins], from 0 to the corner.

    The first band holds what is flat, and the last is the corner of the grid alone.

    >>> [round(float(radius), 2) for radius in band_radius(64, 64, 8)]
    [0.0, 0.15, 0.25, 0.35, 0.45, 0.56, 0.66, 0.71]
    """
    corner = math.hypot((height // 2) / height, (width // 2) / width)
    middle = (torch.arange(num_bins, dtype=torch.float64, device="cpu") + 0.5) / (num_bins - 1)
    middle[0] = 0.0
    return middle.clamp(max=1.0) * corner


def _shown(count: int) -> list[int]:
    """All steps, or as many as are shown, evenly, with the first and the last."""
    if count <= MOST_COLUMNS:
        return list(range(count))
    return [round(column * (count - 1) / (MOST_COLUMNS - 1)) for column in range(MOST_COLUMNS)]


def _std(params: CNSParams, solver: str, pair: tuple[float, float], power: Tensor, modes: Tensor) -> float:
    sigma, sigma_next = pair
    if sigma_next == 0:
        return 0.0
    variance = find_solver(solver).variance(sigma, sigma_next, params.active_churn, power)
    return params.energy_scale * math.sqrt((variance * modes).sum() / modes.sum())
