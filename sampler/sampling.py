"""A CNS run over a schedule: the k-diffusion style loop, and the single step that schedulers share with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

from .acceleration import Accelerator
from .noise import NoiseStreams, checked_batch_index
from .params import CNSParams
from .progress import ProgressMatrix, resolve_progress
from .sigmas import checked_sigmas
from .solvers import DEFAULT_SOLVER, HISTORY, Step, find_solver, ode_euler
from .spectrum import alpha_tilt, band_power, radial_bands


def is_plain(params: CNSParams, solver: str) -> bool:
    """Whether every step is the Euler step of the official chain, bit for bit.

    >>> is_plain(CNSParams(enable_cns=False), "euler")
    True
    """
    return find_solver(solver).plain and params.active_churn == 0


class CNSRun:
    """The steps of one run: the colour of the noise, its streams, and the solver's memory.

    Everything that depends on the schedule alone is computed here, once; a step then draws, colours and
    adds, and nothing in it waits for the device.

    >>> run = CNSRun(CNSParams(), torch.tensor([1.0, 0.5, 0.0]), (1, 4, 8, 8), torch.device("cpu"))

    Args:
        params: says how the noise is coloured and how much of it is added.
        sigmas: [steps + 1], falls within 1 to 0.
        shape: gives the latent's size, [B, C, ..., h, w].
        device: holds the latents and the gains.
        solver: names an entry of `SOLVERS`.
        progress: γ to use for ``gamma_source`` matrix or reference; None takes the shipped unguided matrix.
        patch_size: 2 unpacks FLUX.2's latents before the noise is coloured; 1 leaves latents as they are.
        seed: starts the noise streams, 0 to 2^64 - 1.
        batch_index: says which stream each image draws from; None counts from 0 to B - 1.
        pin_memory: allows page-locked memory, see `NoiseStreams`.

    Raises:
        ValueError: the solver is unknown, the sigmas do not fall within 1 to 0, or the progress does not fit
            ``gamma_source``.
    """

    def __init__(
        self,
        params: CNSParams,
        sigmas: Tensor,
        shape: Sequence[int],
        device: torch.device,
        *,
        solver: str = DEFAULT_SOLVER,
        progress: ProgressMatrix | None = None,
        patch_size: int = 1,
        seed: int = 0,
        batch_index: Sequence[int] | None = None,
        pin_memory: bool = True,
    ) -> None:
        self.solver, self.patch_size = find_solver(solver), patch_size
        self.s_churn, self.energy_scale = params.active_churn, params.energy_scale
        self.sigmas = checked_sigmas(sigmas)
        self._previous: list[tuple[Tensor, float]] = []  # the latest first
        self._streams: NoiseStreams | None = None
        if self.s_churn > 0:
            self._streams = NoiseStreams(seed, checked_batch_index(batch_index, shape[0]), self.sigmas[0], pin_memory)
            index, count = radial_bands(shape[-2] * patch_size, shape[-1] * patch_size, params.num_freq_bins)
            power = power_table(params, resolve_progress(params, progress), self.sigmas, count)
            self._gain, self._band = power.sqrt().float().to(device), index.to(device)

    def draw(self, i: int, x: Tensor) -> Tensor:
        """Draw the white noise of a step; call it at most once for each step, in order.

        A loop calls it once the model is started, before anything that waits for the device: the CPU then draws while
        the device computes.

        Args:
            i: counts the steps from 0.
            x: [B, C, ..., h, w] gives shape and device.

        Returns:
            float32 noise in the shape of x; an empty tensor where the step injects none.
        """
        if self._streams is None or self.sigmas[i + 1] == 0:
            return x.new_empty(0)
        return self._streams.draw(x.shape, x.device)

    def step(self, i: int, x: Tensor, denoised: Tensor, white: Tensor | None = None) -> Tensor:
        """Take a step; call it once for each step, in order.

        Args:
            i: counts the steps from 0.
            x: [B, C, ..., h, w] at ``sigmas[i]``.
            denoised: the predicted x0 at ``sigmas[i]``, in the shape of x.
            white: is what `draw` gave for the step; None draws it here.

        Returns:
            x at ``sigmas[i + 1]``.
        """
        sigma, sigma_next = self.sigmas[i : i + 2]
        if sigma_next == 0:
            return denoised
        if white is None:
            white = self.draw(i, x)
        gain = white if self._streams is None else self._gain[i][self._band]
        step = Step(sigma, sigma_next, self.s_churn, self.energy_scale, self.patch_size, white, gain, self._previous)
        if sigma_next < sigma:  # a repeated sigma has nothing to extrapolate from
            self._previous = [(denoised, sigma), *self._previous][:HISTORY]
        return self.solver.step(x, denoised, step)


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
    solver: str = DEFAULT_SOLVER,
    progress: ProgressMatrix | None = None,
    patch_size: int = 1,
    seed: int | None = None,
    batch_index: Sequence[int] | None = None,
    pin_memory: bool = True,
    accelerator: Accelerator | None = None,
) -> Tensor:
    """Colored Noise Sampling (arXiv:2605.30332) in k-diffusion's calling convention.

    Noise is injected after every step whose next sigma is above 0, so a schedule split in two injects at
    the split. The tilt runs over the steps of the schedule given.

    >>> x, sigmas = torch.ones(1, 4, 8, 8), torch.tensor([1.0, 0.5, 0.0])
    >>> sample_cns(lambda x, sigma: 0 * x, x, sigmas, disable=True, params=CNSParams()).shape
    torch.Size([1, 4, 8, 8])

    Args:
        model: ``model(x, sigma [B], **extra_args) -> x0`` makes the guided prediction.
        x: [B, C, ..., h, w] holds the noise at ``sigmas[0]``, in any floating dtype.
        sigmas: [steps + 1], falls from at most 1 to at least 0; where every step is plain Euler (`is_plain`) any
            values are taken.
        extra_args: go to the model; None passes nothing.
        callback: takes ``{"x", "i", "sigma", "sigma_hat", "denoised"}`` before each step.
        disable: True hides the progress bar.
        params, solver, progress, patch_size, batch_index, pin_memory: see `CNSRun`.
        seed: starts the injected noise, 0 to 2^64 - 1; None takes ``extra_args["seed"]``, or 0 without one.
        accelerator: decides at which steps the model is called; None calls it at each.

    Returns:
        x at ``sigmas[-1]``, in its shape and dtype.

    Raises:
        ValueError: as `CNSRun`.
    """
    extra_args = {} if extra_args is None else extra_args
    if seed is None:
        seed = extra_args.get("seed") or 0
    if len(sigmas) < 2:
        return x
    run = None
    if not is_plain(params, solver):
        run = CNSRun(
            params,
            sigmas,
            x.shape,
            x.device,
            solver=solver,
            progress=progress,
            patch_size=patch_size,
            seed=seed,
            batch_index=batch_index,
            pin_memory=pin_memory,
        )
    s_in = x.new_ones([x.shape[0]])
    for i in trange(len(sigmas) - 1, disable=disable):
        predict = partial(model, x, sigmas[i] * s_in, **extra_args)
        denoised = predict() if accelerator is None else accelerator.x0(i, predict)
        white = None if run is None else run.draw(i, x)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = ode_euler(x, denoised, sigmas[i], sigmas[i + 1]) if run is None else run.step(i, x, denoised, white)
    return x


def power_table(
    params: CNSParams,
    progress: ProgressMatrix,
    sigmas: Sequence[float],
    count: Tensor,
    chosen: Sequence[int] | None = None,
) -> Tensor:
    """β² of the steps and bands of a schedule.

    Args:
        params: give the number of bins and the shape of the spectrum.
        progress: says how far each band is resolved.
        sigmas: [steps + 1], fall within 1 to 0.
        count: [bins] modes of each band, as `radial_bands` counts them.
        chosen: names the steps to compute, counted from 0; None is all of them.

    Returns:
        float64 [chosen, bins].
    """
    steps, bins = len(sigmas) - 1, params.num_freq_bins
    rows = [
        band_power(params, progress.at(1.0 - sigmas[i], bins), alpha_tilt(params, i, steps), count)
        for i in (range(steps) if chosen is None else chosen)
    ]
    return torch.stack(rows)
