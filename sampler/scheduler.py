"""CNS as a diffusers scheduler, for ``Flux2KleinPipeline`` and any other flow-matching pipeline."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Literal

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  pipelines look for it here to load us
from torch import Tensor

from .params import MAX_SEED, CNSParams, checked_number, public_name
from .progress import ProgressMatrix
from .sampling import CNSRun, is_plain
from .solvers import DEFAULT_SOLVER, find_solver


class FlowMatchCNSScheduler(FlowMatchEulerDiscreteScheduler):
    """``FlowMatchEulerDiscreteScheduler`` with Colored Noise Sampling (arXiv:2605.30332).

    The schedule is the parent's; only the step differs. ``cns_*`` are `CNSParams` under their public
    names, saved and loaded with the config::

        pipe.scheduler = FlowMatchCNSScheduler.from_config(pipe.scheduler.config, cns_s_churn=0.5)
        pipe.scheduler.set_run(seed=7, latent_size=(48, 64))

    Pipelines hand a scheduler neither a seed nor the size of packed tokens: `set_run` does. Without it the
    seed is 0 and packed tokens are taken as a square grid, with a warning.

    Args:
        num_train_timesteps ... stochastic_sampling: go to the parent.
        enable_cns, cns_*: see `CNSParams`.
        solver: names an entry of `SOLVERS`.
        patch_size: gives the side of the patches that the latent packs into channels; None takes 2 for packed tokens
            [B, tokens, channels] (FLUX.1, FLUX.2) and 1 for grids [B, channels, ..., height, width].

    Raises:
        ValueError: a value is out of range, the solver is unknown, or the config asks for sigmas or noise that CNS
            cannot work with.
    """

    _step_index: int | None

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
        enable_cns: bool = True,
        cns_s_churn: float = 0.5,
        cns_gamma_source: str = "matrix",
        cns_power_gamma: float = 0.75,
        cns_gamma_divider: float = 1.73,
        cns_alpha_tilt_start: float = 0.15,
        cns_alpha_tilt_end: float = -0.5,
        cns_alpha_use_fnorm: bool = True,
        cns_alpha_exp_interp: bool = True,
        cns_alpha_exp_sharpness: float = 0.75,
        cns_num_freq_bins: int = 32,
        cns_energy_scale: float = 0.98,
        cns_formula: str = "endpoint",
        solver: str = DEFAULT_SOLVER,
        patch_size: int | None = None,
    ) -> None:
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            invert_sigmas=invert_sigmas,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
            stochastic_sampling=stochastic_sampling,
        )
        if invert_sigmas or stochastic_sampling:
            raise ValueError("invert_sigmas or stochastic_sampling is on; CNS brings its own noise and needs both off.")
        self.params = CNSParams(**{spec.name: self.config[public_name(spec.name)] for spec in fields(CNSParams)})
        find_solver(solver)
        self.set_run()

    def set_run(
        self,
        seed: int = 0,
        latent_size: tuple[int, int] | None = None,
        batch_index: Sequence[int] | None = None,
        progress: ProgressMatrix | None = None,
    ) -> None:
        """Set what the next runs need and no pipeline passes on; it holds until it is set again.

        Args:
            seed: starts the injected noise, 0 to 2^64 - 1.
            latent_size: gives (height, width) in tokens, for packed tokens of one picture each (not of a video); None
                takes a square and warns.
            batch_index: says which stream each image draws from; None counts from 0 to B - 1.
            progress: γ to use; None takes the shipped unguided matrix.

        Raises:
            ValueError: the seed is out of range.
        """
        self._seed = checked_number("seed", seed, 0, MAX_SEED, whole=True)
        self._latent_size, self._batch_index, self._progress = latent_size, batch_index, progress

    def set_sigmas(self, sigmas: np.ndarray | Sequence[float], device: str | torch.device | None = None) -> None:
        """Set a schedule as it stands; `set_timesteps` would shift it.

        Args:
            sigmas: [steps + 1], fall from at most 1 to 0.
            device: holds the sigmas; None takes the CPU.
        """
        self.sigmas = torch.as_tensor(np.asarray(sigmas), dtype=torch.float32, device=device or "cpu")
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self.num_inference_steps = len(self.timesteps)
        self._step_index = self._begin_index = None

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """One step from the predicted velocity ``ε - x0``.

        Args:
            model_output: holds the velocity, in the shape of ``sample``.
            timestep: names the step, one of ``timesteps``.
            sample: holds packed tokens [B, tokens, channels] or a grid [B, channels, ..., height, width].
            s_churn, s_tmin, s_tmax, s_noise, generator: change nothing, as in the parent's deterministic step; the
                config and `set_run` set the noise.
            per_token_timesteps: go to the parent where CNS is off; CNS needs one sigma for the whole picture.
            return_dict: False returns a tuple.

        Returns:
            the next sample, in the dtype of ``model_output``.

        Raises:
            ValueError: per_token_timesteps are given to CNS, or the size of packed tokens is unknown or does not fit.
        """
        if self.step_index is None:  # the first step of a schedule: start the streams again
            self._init_step_index(timestep)
            self._first = self.step_index
            self._size = self._grid_size(sample)
            self._run = None if is_plain(self.params, self.config.solver) else self._start(sample)
        if self._run is None:
            return super().step(
                model_output, timestep, sample, per_token_timesteps=per_token_timesteps, return_dict=return_dict
            )
        if per_token_timesteps is not None:
            raise ValueError("per_token_timesteps were given; CNS needs one sigma for all tokens. Turn enable_cns off.")
        x, velocity = self._to_grid(sample.float()), self._to_grid(model_output.float())
        denoised = x - self.sigmas[self.step_index] * velocity
        x = self._run.step(self.step_index - self._first, x, denoised)
        previous = (x.flatten(2).transpose(1, 2) if sample.ndim == 3 else x).to(model_output.dtype)
        self._step_index = self.step_index + 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def _start(self, sample: Tensor) -> CNSRun:
        return CNSRun(
            self.params,
            self.sigmas[self._first :],
            self._to_grid(sample).shape,
            sample.device,
            solver=self.config.solver,
            progress=self._progress,
            patch_size=self.config.patch_size or (2 if sample.ndim == 3 else 1),
            seed=self._seed,
            batch_index=self._batch_index,
        )

    def _to_grid(self, sample: Tensor) -> Tensor:
        if sample.ndim != 3:
            return sample
        return sample.transpose(1, 2).unflatten(2, self._size)

    def _grid_size(self, sample: Tensor) -> tuple[int, int]:
        """(height, width) of packed tokens; for grids the sample's own, of which nothing else is known."""
        if sample.ndim != 3:
            return sample.shape[-2], sample.shape[-1]
        tokens = sample.shape[1]
        if self._latent_size is not None:
            height, width = self._latent_size
            if height * width != tokens:
                raise ValueError(
                    f"latent_size is {height}x{width} = {height * width} tokens, the sample has {tokens}; "
                    "give set_run the size of this picture's latent."
                )
            return height, width
        side = math.isqrt(tokens)
        if self.params.active_churn > 0:
            if side * side != tokens:
                raise ValueError(
                    f"{tokens} packed tokens do not say how wide the picture is; "
                    "call scheduler.set_run(latent_size=(height, width)) in tokens before the pipeline."
                )
            warnings.warn(
                f"taking {tokens} packed tokens as a square of {side}x{side}; for another shape call "
                "scheduler.set_run(latent_size=(height, width)).",
                stacklevel=4,
            )
            return side, side
        return 1, tokens
