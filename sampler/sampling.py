"""A CNS run over a schedule: the k-diffusion style loop, and the single step that schedulers share with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

from .noise import NoiseStreams, checked_batch_index
from .params import CNSParams
from .progress import ProgressMatrix, resolve_progress
from .solvers import SOLVERS, Step, ode_euler
from .spectrum import alpha_tilt, band_power, radial_bands


class CNSRun:
    """What one run needs at each step: the colour, the noise stream and the solver's memory.

    Everything that depends on the schedule alone is computed here, once; a step then draws, colours and
    adds, and nothing in it waits for the device.

    Args:
        params: the CNS parameters; off, or at ``s_churn`` 0 under ``euler`` and ``sde``, every step is plain Euler.
        sigmas: [steps + 1], falling, in [0, 1]; a rising one is allowed only where steps are plain Euler.
        shape: of the latent, [B, C, ..., h, w].
        progress: γ for ``gamma_source`` matrix or reference; None takes the shipped unguided matrix.
        patch_size: 2 for FLUX.2's packed latents, 1 for others.
        seed: of the noise streams, 0 to 2^64 - 1.
        batch_index: of each image, 0 to B - 1 where None.
    """

    def __init__(
        self,
        params: CNSParams,
        sigmas: Tensor,
        shape: Sequence[int],
        device: torch.device,
        *,
        progress: ProgressMatrix | None = None,
        patch_size: int = 1,
        seed: int = 0,
        batch_index: Sequence[int] | None = None,
    ) -> None:
        self.params = params
        self.sigmas = sigmas
        self.patch_size = patch_size
        self.plain = not params.enable_cns or (params.s_churn == 0 and params.solver != "sde_2m")
        if self.plain:
            return
        self._values = _checked_sigmas(sigmas)
        self._previous: tuple[Tensor, float] | None = None
        if params.s_churn == 0:
            return
        self._streams = NoiseStreams(seed, checked_batch_index(batch_index, shape[0]), self._values[0])
        index, count = radial_bands(shape[-2] * patch_size, shape[-1] * patch_size, params.num_freq_bins)
        power = power_table(params, resolve_progress(params, progress), self._values, count)
        self._gains = power.sqrt().float().to(device), index.to(device)

    def step(self, i: int, x: Tensor, denoised: Tensor) -> Tensor:
        """x at ``sigmas[i + 1]`` from x and the predicted x0 at ``sigmas[i]``; call it once a step, in order."""
        if self.plain:
            return ode_euler(x, denoised, self.sigmas[i], self.sigmas[i + 1])
        sigma, sigma_next = self._values[i : i + 2]
        if sigma_next == 0:
            return denoised
        white = gain = None
        if self.params.s_churn > 0:
            table, index = self._gains
            white, gain = self._streams.draw(x.shape, x.device), table[i][index]
        step = Step(
            sigma, sigma_next, self.params.s_churn, self.params.energy_scale, self.patch_size, white, gain,
            self._previous,
        )
        self._previous = (denoised, sigma)
        return SOLVERS[self.params.solver](x, denoised, step)


@torch.no_grad()
def sample_cns(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    params: CNSParams,
    progress: ProgressMatrix | None = None,
    patch_size: int = 1,
    seed: int | None = None,
    batch_index: Sequence[int] | None = None,
) -> Tensor:
    """Colored Noise Sampling (arXiv:2605.30332) in k-diffusion's calling convention.

    Noise is injected after every step whose next sigma is above 0, so a schedule split in two injects at
    the split. The tilt runs over the steps of the schedule given.

    Args:
        model: ``model(x, sigma [B], **extra_args) -> x0``, the guided prediction.
        x: [B, C, ..., h, w] noise at ``sigmas[0]``, any floating dtype.
        sigmas: [steps + 1], falling from at most 1 to at least 0.
        callback: called with ``{"x", "i", "sigma", "sigma_hat", "denoised"}`` before each step.
        disable: of the progress bar.
        params, progress, patch_size, batch_index: see `CNSRun`.
        seed: of the injected noise; where None, ``extra_args["seed"]``, else 0.

    Returns:
        x at ``sigmas[-1]``.
    """
    extra_args = {} if extra_args is None else extra_args
    if seed is None:
        seed = extra_args.get("seed") or 0
    if len(sigmas) < 2:
        return x
    run = CNSRun(
        params, sigmas, x.shape, x.device,
        progress=progress, patch_size=patch_size, seed=seed, batch_index=batch_index,
    )
    s_in = x.new_ones([x.shape[0]])
    for i in trange(len(sigmas) - 1, disable=disable):
        denoised = model(x, sigmas[i] * s_in, **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = run.step(i, x, denoised)
    return x


def _checked_sigmas(sigmas: Tensor) -> list[float]:
    values = sigmas.tolist()
    falling = all(after <= before for before, after in pairwise(values))
    if not (falling and values[-1] >= 0.0 and 0.0 < values[0] <= 1.0):
        raise ValueError(
            f"the {len(values)} sigmas go from {values[0]:g} to {values[-1]:g}; CNS needs flow-matching sigmas that "
            "fall from at most 1, above 0, to at least 0. "
            "Use a flow-matching model and its own scheduler, or turn CNS off."
        )
    return values


def power_table(params: CNSParams, progress: ProgressMatrix, sigmas: Sequence[float], count: Tensor) -> Tensor:
    """β² of every step and band of a schedule, float64 [steps, bins]; ``count`` from `radial_bands`."""
    steps, bins = len(sigmas) - 1, params.num_freq_bins
    rows = [
        band_power(params, progress.at(1.0 - sigma, bins), alpha_tilt(params, i, steps), count)
        for i, sigma in enumerate(sigmas[:-1])
    ]
    return torch.stack(rows)
