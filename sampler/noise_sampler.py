"""Coloured noise for samplers that are not ours: what k-diffusion calls a ``noise_sampler``."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .noise import NoiseStreams, checked_batch_index
from .params import CNSParams
from .progress import ProgressMatrix, resolve_progress
from .sigmas import checked_sigmas
from .spectrum import alpha_tilt, band_power, color_noise, radial_bands


class ColoredNoiseSampler:
    """``noise_sampler(sigma, sigma_next) -> noise``, coloured by the flow time at which the interval starts.

    The noise of an interval is ``(W(σ') - W(σ)) / sqrt|σ' - σ|`` of a Brownian motion W in σ, as k-diffusion's Brownian
    tree gives it: where a sampler draws for several intervals from one start in turn, as ``dpmpp_sde`` does for half a
    step and the whole one, they share the noise of what they share. Intervals from different starts are independent,
    which is what samplers expect that draw once for each part of a step.

    >>> noise = ColoredNoiseSampler(CNSParams(), [1.0, 0.5, 0.0], torch.zeros(1, 4, 8, 8), lambda sigma: 1 - sigma)
    >>> noise(1.0, 0.5).shape
    torch.Size([1, 4, 8, 8])

    Args:
        params: say how the noise is coloured; ``s_churn`` is not read, since the amount is the sampler's.
        sigmas: [steps + 1], the schedule; falls.
        x: [B, C, ..., h, w] gives the shape, the dtype and the device of the noise.
        flow_time: t of a sigma, rising from 0 (noise) to 1 as the sigma falls.
        progress: γ to use for ``gamma_source`` matrix or reference; None takes the shipped unguided matrix.
        patch_size: 2 unpacks FLUX.2's latents before the noise is coloured; 1 leaves latents as they are.
        seed: starts the streams, 0 to 2^64 - 1; they are those of `sample_cns`.
        batch_index: says which stream each image draws from; None counts from 0 to B - 1.
        pin_memory: allows page-locked memory, see `NoiseStreams`.

    Raises:
        ValueError: the sigmas do not fall, or the progress does not fit ``gamma_source``.
    """

    def __init__(
        self,
        params: CNSParams,
        sigmas: Tensor | Sequence[float],
        x: Tensor,
        flow_time: Callable[[float], float],
        *,
        progress: ProgressMatrix | None = None,
        patch_size: int = 1,
        seed: int = 0,
        batch_index: Sequence[int] | None = None,
        pin_memory: bool = True,
    ) -> None:
        self.draws = 0
        self._params, self._progress, self._flow_time = params, resolve_progress(params, progress), flow_time
        self._shape, self._dtype, self._device, self._patch_size = x.shape, x.dtype, x.device, patch_size
        flow_sigmas = checked_sigmas([1.0 - flow_time(float(sigma)) for sigma in sigmas], "CNS Noise")
        self._steps = len(flow_sigmas) - 1
        self._times = [1.0 - sigma for sigma in flow_sigmas]
        self._streams = NoiseStreams(seed, checked_batch_index(batch_index, x.shape[0]), flow_sigmas[0], pin_memory)
        index, self._count = radial_bands(x.shape[-2] * patch_size, x.shape[-1] * patch_size, params.num_freq_bins)
        self._band = index.to(x.device)
        self._start: tuple[float, bool] | None = None
        self._lengths: list[float] = []  # of the intervals drawn from the start, rising, with W at each of their ends
        self._ends: list[Tensor] = []

    def __call__(self, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
        """Noise of variance ``energy_scale²`` for a step or a part of one, in the shape of x."""
        self.draws += 1
        start, end = float(sigma), float(sigma_next)
        gain = self.power(start).sqrt().float().to(self._device)[self._band]
        colored = color_noise(self._white(start, end), gain, self._patch_size)
        return (self._params.energy_scale * colored).to(self._dtype)

    def power(self, sigma: float) -> Tensor:
        """β² of every band, float64 [bins], for noise from a sigma on.

        γ is looked up by the flow time; the tilt by the sigma's position in the schedule, between two sigmas of it in
        proportion to the flow time.
        """
        time = self._flow_time(sigma)
        position = min(float(np.interp(time, self._times, range(self._steps + 1))), self._steps - 1)
        gamma = self._progress.at(time, self._params.num_freq_bins)
        return band_power(self._params, gamma, alpha_tilt(self._params, position, self._steps), self._count)

    def _white(self, start: float, end: float) -> Tensor:
        """Unit noise of an interval, with what it shares with those drawn before from the same start."""
        length, here = abs(end - start), (start, end > start)
        if length == 0:
            return self._fresh()
        if here != self._start:
            self._start, self._lengths, self._ends = here, [], []
        at = bisect.bisect_left(self._lengths, length)
        if at == len(self._lengths) or self._lengths[at] != length:
            before = self._lengths[at - 1] if at else 0.0
            value = self._ends[at - 1] if at else torch.zeros(self._shape, device=self._device)
            spread = length - before
            if at < len(self._lengths):  # between two known ends: a Brownian bridge
                whole = self._lengths[at] - before
                value = value + (length - before) / whole * (self._ends[at] - value)
                spread *= (self._lengths[at] - length) / whole
            self._ends.insert(at, value + math.sqrt(spread) * self._fresh())
            self._lengths.insert(at, length)
        return self._ends[at] / math.sqrt(length)

    def _fresh(self) -> Tensor:
        return self._streams.draw(self._shape, self._device)
