"""The picture of a run's noise on CNS KSampler and CNS Sampler: its numbers, before a run and after it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import comfy.model_base
import comfy.supported_models
import torch
from torch import Tensor

from ..klein.presets import PRESETS
from ..klein.sizes import latent_size, output_size, parse_image_size
from ..sampler import CNSParams, ProgressMatrix
from ..sampler.advice import advice
from ..sampler.gamma_fits import UNGUIDED
from ..sampler.noise_view import NoiseView, noise_view
from ..sampler.params import GAMMA_FILE, checked_number
from ..sampler.progress import field_progress, reference_power
from ..sampler.solvers import DEFAULT_SOLVER, SOLVERS
from .cns_inputs import load_progress
from .schedule import MAX_STEPS, SCHEDULERS, make_sigmas

KEY = "klein_noise"  # in a node's ui; the browser's modules know it too
PATCH, CELL = 2, 8  # of klein: cells in a patch's side, pixels in a cell's
MOST_SIDE = 16384  # pixels, as ComfyUI's own latents
MOST_POWERS = 128
DEFAULT_SIDE = 1024  # pixels
# The presets speak of the request; the nodes have ComfyUI's names.
WIDGETS = {"num_inference_steps": "steps", "guidance_scale": "cfg"}


def presets(values: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of the route ``presets``: for each name ``values``, by the names of the widgets, and ``source``."""
    return {
        name: {"values": {WIDGETS.get(key, key): value for key, value in found.values.items()}, "source": found.source}
        for name, found in PRESETS.items()
    }


def preview(values: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of the route ``noise``: a run that has not been, of klein.

    Args:
        values: hold widgets by name (``cns_*``, ``cns_gamma_file``, ``solver``, ``scheduler``, ``steps``, ``denoise``,
            ``cfg``), ``width`` and ``height`` in pixels or an ``image_size`` with the ``first`` picture's [width,
            height], and ``reference``, the power per band of an earlier run's pictures. What is left out takes the
            endpoint's value, 1024 pixels, and no reference.

    Returns:
        as `as_json`, with ``advice``: sentences about the settings.

    Raises:
        ValueError: a value is out of range, the γ file is missing, or γ needs pictures that are not known.
    """
    given = dict(values)
    steps = checked_number("steps", given.pop("steps", 28), 1, MAX_STEPS, whole=True)
    denoise = checked_number("denoise", given.pop("denoise", 1.0), 0.0, 1.0)
    cfg = checked_number("cfg", given.pop("cfg", 5.0), 0.0, 100.0)
    size = _size(given)
    solver = _one_of(SOLVERS, "solver", given.pop("solver", DEFAULT_SOLVER))
    scheduler = _one_of(SCHEDULERS, "scheduler", given.pop("scheduler", SCHEDULERS[0]))
    reference, gamma_file = given.pop("reference", None), str(given.pop(GAMMA_FILE, UNGUIDED))
    params = CNSParams.from_endpoint({"enable_cns": True, **given})
    unknown = sorted(set(given) - set(params.to_request()))
    if unknown:
        raise ValueError(f"unknown values: {', '.join(unknown)}. Leave them out.")
    height, width = latent_size(*size)
    if denoise == 0 or steps / denoise > MAX_STEPS:
        raise ValueError(f"denoise is {denoise:g} with steps {steps}; there is nothing to draw.")
    sigmas = make_sigmas(_klein_sampling(), scheduler, steps, denoise, height * width).tolist()
    from_pictures = params.gamma_source == "reference"
    progress = field_progress(_powers(reference)) if from_pictures else load_progress(params, gamma_file)
    view = noise_view(params, sigmas, (PATCH * height, PATCH * width), solver=solver, progress=progress, cell=CELL)
    return as_json(view, size) | {"advice": advice(params, solver, sigmas, cfg)}


def of_run(
    params: CNSParams,
    sigmas: Tensor,
    shape: Sequence[int],
    *,
    solver: str,
    progress: ProgressMatrix | None,
    patch_size: int,
    cell: float,
) -> dict[str, Any] | None:
    """A run's own numbers, as `as_json`; None where no noise is injected.

    Args:
        shape: gives the latent's, [..., h, w].
        cell: gives the pixels of an unpatchified cell's side.
    """
    if params.active_churn == 0 or len(sigmas) < 2:
        return None
    height, width = (side * patch_size for side in shape[-2:])
    view = noise_view(
        params, sigmas.clamp(max=1).tolist(), (height, width), solver=solver, progress=progress, cell=cell
    )
    return as_json(view, [round(width * cell), round(height * cell)])


def measured(result: Tensor, references: Sequence[Tensor], patch_size: int, params: CNSParams) -> dict[str, Any]:
    """What a finished run adds to its numbers.

    Args:
        result: [B, C, h, w], scaled as the model sees it, and so are the references.

    Returns:
        ``spectrum`` [bins]: the result's power per band, ``first`` [bins] the first reference's, ``reference`` that of
        all, which `preview` takes again; left out what holds NaN, or is not there.
    """
    asked = {"spectrum": [result], "first": references[:1], "reference": references}
    return {
        name: _numbers(reference_power(latents, patch_size, params.num_freq_bins))
        for name, latents in asked.items()
        if latents and all(latent.isfinite().all() for latent in latents)
    }


def as_json(view: NoiseView, size: Sequence[int]) -> dict[str, Any]:
    """A `NoiseView` and the picture's (width, height) as JSON; infinite wavelengths are null."""
    return {
        **{name: _numbers(value) for name, value in view._asdict().items()},
        "size": list(size),
    }


def _size(given: dict[str, Any]) -> tuple[int, int]:
    """(width, height) in pixels; what was given is taken out."""
    first, image_size = given.pop("first", None), given.pop("image_size", None)
    sides = {side: given.pop(side, DEFAULT_SIDE) for side in ("width", "height")}
    if first is not None:
        if not isinstance(first, list) or len(first) != 2:
            raise ValueError(f"first is {first!r}; give the first picture's [width, height] in pixels.")
        first = tuple(checked_number("a side of first", side, 1, MOST_SIDE, whole=True) for side in first)
    if image_size is not None:
        return output_size(parse_image_size(image_size), first)
    width, height = (checked_number(side, value, 16, MOST_SIDE, whole=True) for side, value in sides.items())
    return width, height


def _one_of(allowed: Iterable[str], name: str, value: Any) -> str:
    if value not in list(allowed):
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}.")
    return value


def _numbers(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [_numbers(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _powers(reference: Any) -> Tensor:
    if reference is None:
        raise ValueError(
            "cns_gamma_source is 'reference': gamma is that of the connected pictures, and is known after a run."
        )
    if not isinstance(reference, list) or not 2 <= len(reference) <= MOST_POWERS:
        raise ValueError(f"reference must be a list of 2 to {MOST_POWERS} numbers.")
    powers = [checked_number("a power of reference", power, 0.0, 1e30) for power in reference]
    return torch.tensor(powers, dtype=torch.float64)


def _klein_sampling() -> Any:
    """ComfyUI's model_sampling of klein, for the schedules that depend on it."""
    config = SimpleNamespace(sampling_settings=comfy.supported_models.Flux2.sampling_settings)
    return comfy.model_base.model_sampling(config, comfy.model_base.ModelType.FLUX)
