"""CNS Sampler: Colored Noise Sampling as a SAMPLER, for SamplerCustomAdvanced and any flow-matching model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.model_management
import comfy.samplers
from comfy_api.latest import io
from torch import Tensor

from ..klein.memory import memory_advice
from ..sampler import CNSParams, ProgressMatrix, sample_cns
from ..sampler.acceleration import Accelerator
from ..sampler.advice import advice
from ..sampler.params import SWITCH
from .acceleration import accelerate, acceleration_input, cache_advice, interruptible, plan_run
from .cns_inputs import (
    cns_inputs,
    downscale_ratio,
    gamma_stamp,
    load_progress,
    patch_size,
    solver_input,
)
from .common import CATEGORY
from .messages import say
from .noise_picture import KEY, of_run

LOWER = "lower the size or the number of the pictures to make, or give fewer or smaller reference pictures"


class CNSSampler(io.ComfyNode):
    """A SAMPLER; patch size from the model's latent format, seed from the host."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CNSSampler",
            display_name="CNS Sampler",
            category=CATEGORY,
            description="Colored Noise Sampling as a sampler for SamplerCustomAdvanced.",
            search_aliases=["colored noise", "klein", "sde"],
            inputs=[
                solver_input(),
                *cns_inputs(switch=False),
                io.Int.Input(
                    "cns_seed",
                    default=-1,
                    min=-1,
                    max=2**63 - 1,
                    advanced=True,
                    tooltip="Seed of the injected noise. -1 takes the run's own; give one where the run has none "
                    "(DisableNoise).",
                ),
                acceleration_input(),
            ],
            outputs=[io.Sampler.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, cns_gamma_file: str) -> bool:
        return True  # a missing file fails when the node runs, with the remedy

    @classmethod
    def fingerprint_inputs(cls, cns_gamma_file: str, **inputs: Any) -> Any:
        return gamma_stamp(cns_gamma_file)

    @classmethod
    def execute(
        cls, solver: str, cns_seed: int, cns_gamma_file: str, acceleration: str = "none", **values: Any
    ) -> io.NodeOutput:
        params = CNSParams.from_endpoint({**values, SWITCH: True})
        if params.gamma_source == "reference":
            raise ValueError(
                "cns_gamma_source is 'reference', but this node sees no conditioning and so no reference pictures; "
                "use CNS KSampler, or choose 'matrix'."
            )
        options = {
            "params": params,
            "solver": solver,
            "acceleration": acceleration,
            "progress": load_progress(params, cns_gamma_file),
            "seed": None if cns_seed < 0 else cns_seed,
            "tell": partial(say, cls.hidden.unique_id),
        }
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample, options))


def sample(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Any = None,
    callback: Any = None,
    disable: Any = None,
    *,
    params: CNSParams,
    solver: str,
    acceleration: str,
    progress: ProgressMatrix | None,
    tell: Callable[..., None],
    seed: int | None = None,
    batch_index: list[int] | None = None,
) -> Tensor:
    """`sample_cns` as ComfyUI's KSAMPLER calls a sampler; the wrapper brings masks, noise scaling and previews.

    Args:
        acceleration: one of `LEVELS`.
        tell: called in each run with the sentences that the user should read about the settings, and as ``klein_noise``
            with the numbers of `noise_picture`.
    """
    if params.enable_cns and x.ndim < 4:
        raise ValueError(
            f"the latent reaches the sampler as {list(x.shape)}, without height and width; CNS cannot colour its "
            "noise. Turn enable_cns off in CNS KSampler, or use another sampler."
        )
    extra_args = {} if extra_args is None else extra_args
    planned = plan_run(acceleration, model, sigmas, solver, extra_args)
    said = advice(params, solver, sigmas.tolist(), getattr(model.inner_model, "cfg", None))
    said += cache_advice(model, extra_args, params.active_churn)
    if planned.sentence:
        said.insert(0, planned.sentence)
    accelerator = None
    if planned.level != "none":
        accelerator = Accelerator(planned)
        extra_args, callback = accelerate(accelerator, model, extra_args), interruptible(callback)
    patches = patch_size(model.inner_model.model_patcher)
    numbers = of_run(
        params,
        sigmas,
        x.shape,
        solver=solver,
        progress=progress,
        patch_size=patches,
        cell=downscale_ratio(model.inner_model.model_patcher) / patches,
    )
    tell(said, **{KEY: numbers})
    with memory_advice(LOWER):
        return sample_cns(
            model,
            x,
            sigmas,
            extra_args,
            callback,
            disable,
            params=params,
            solver=solver,
            progress=progress,
            seed=seed,
            batch_index=batch_index,
            patch_size=patches,
            pin_memory=pins_memory(),
            accelerator=accelerator,
        )


def pins_memory() -> bool:
    """Whether ComfyUI pins memory here: not where a user, or the kind of device, forbids it."""
    return getattr(comfy.model_management, "MAX_PINNED_MEMORY", 0) > 0
