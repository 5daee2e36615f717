"""CNS Noise: colours the noise that any sampler of k-diffusion's form injects."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import comfy.samplers
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ..sampler import CNSParams, ColoredNoiseSampler, ProgressMatrix, reference_progress
from ..sampler.advice import guidance_advice
from ..sampler.params import SWITCH
from .cns_inputs import cns_inputs, gamma_stamp, load_progress, patch_size
from .cns_sampler import pins_memory
from .common import CATEGORY
from .flow_time import flow_time
from .messages import say

KEY = "klein_cns_noise"  # of the wrapper on a model
ARGUMENT = "noise_sampler"  # k-diffusion's name
SILENT = {"res_multistep", "res_multistep_cfg_pp"}  # of ComfyUI: have the argument and never call it
PASSED_ON = "dpm_adaptive"  # of ComfyUI: hands all its keywords on to a function that has the argument


class CNSNoise(io.ComfyNode):
    """MODEL in, MODEL out; the sampler that runs it gets coloured noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CNSNoise",
            display_name="CNS Noise",
            category=CATEGORY,
            description="Colours the noise that the sampler behind it adds (er_sde, dpmpp_2m_sde, euler_ancestral and "
            "the like); how much is added stays the sampler's choice.",
            search_aliases=["colored noise", "noise_sampler", "er_sde", "ancestral"],
            inputs=[
                io.Model.Input("model", tooltip="The model that a sampler takes next."),
                io.Boolean.Input(
                    SWITCH,
                    default=True,
                    tooltip="On, the sampler's noise is coloured. Off, the model passes untouched.",
                ),
                *cns_inputs(switch=False, churn=False),
                io.Int.Input(
                    "cns_seed",
                    default=-1,
                    min=-1,
                    max=2**63 - 1,
                    advanced=True,
                    tooltip="Seed of the injected noise. -1 takes the run's own; give one where the run has none "
                    "(DisableNoise).",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, cns_gamma_file: str) -> bool:
        return True  # a missing file fails when the node runs, with the remedy

    @classmethod
    def fingerprint_inputs(cls, cns_gamma_file: str, **inputs: Any) -> Any:
        return gamma_stamp(cns_gamma_file)

    @classmethod
    def execute(cls, model: Any, cns_seed: int, cns_gamma_file: str, **values: Any) -> io.NodeOutput:
        params = CNSParams.from_endpoint(values)
        if not params.enable_cns:
            return io.NodeOutput(model)
        if model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
            raise ValueError("the model comes from another CNS Noise; one colours all the noise. Leave one out.")
        model = model.clone()
        wrapper = partial(
            _with_colored_noise,
            params=params,
            progress=load_progress(params, cns_gamma_file),
            seed=None if cns_seed < 0 else cns_seed,
            tell=partial(say, cls.hidden.unique_id),
        )
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, wrapper)
        return io.NodeOutput(model)


def _with_colored_noise(executor: Any, noise: Any, latent_image: Any, sampler: Any, *args: Any, **settings: Any) -> Any:
    """A wrapper of ComfyUI's ``CFGGuider.outer_sample``; the keywords of `colored` go on to it."""
    own = {name: settings.pop(name) for name in ("params", "progress", "seed", "tell")}
    return executor(noise, latent_image, colored(sampler, **own), *args, **settings)


def colored(
    sampler: Any,
    *,
    params: CNSParams,
    progress: ProgressMatrix | None,
    seed: int | None,
    tell: Callable[[list[str]], None],
) -> Any:
    """The sampler with coloured noise in place of its own.

    Args:
        sampler: a KSAMPLER of ComfyUI, from core or another pack.
        seed: of the noise; None takes the run's.
        tell: called after each run with the sentences that the user should read.

    Raises:
        ValueError: the sampler takes no ``noise_sampler``, or has one.
    """
    name = checked_name(sampler)
    function, options = sampler.sampler_function, sampler.extra_options

    @wraps(function)
    def with_colored_noise(model: Any, x: Tensor, sigmas: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.ndim < 4:
            raise ValueError(
                f"the latent reaches the sampler as {list(x.shape)}, without height and width (sound, or several "
                "latents packed in one); CNS Noise cannot colour its noise. Turn its enable_cns off."
            )
        guider = model.inner_model
        own_seed = seed if seed is not None else (kwargs.get("extra_args") or {}).get("seed") or 0
        noise = ColoredNoiseSampler(
            params,
            sigmas,
            x,
            partial(flow_time, guider.inner_model.model_sampling),
            progress=progress if params.gamma_source != "reference" else of_references(guider, params),
            patch_size=patch_size(guider.model_patcher),
            seed=own_seed,
            pin_memory=pins_memory(),
        )
        result = function(model, x, sigmas, *args, **{**kwargs, ARGUMENT: noise})
        said = guidance_advice(params, getattr(guider, "cfg", None))
        if any(sigma > 0 for sigma in sigmas[1:].tolist()) and (noise.draws == 0 or not _amount(function, options)):
            said.insert(
                0,
                f"the sampler {name} added no noise in this run, so nothing was coloured. Raise its eta and s_noise "
                f"where it has them, or take another: {', '.join(drawing_samplers())}.",
            )
        tell(said)
        return result

    changed = copy.copy(sampler)
    changed.sampler_function = with_colored_noise
    return changed


def checked_name(sampler: Any) -> str:
    """The name of a sampler whose noise can be coloured.

    Raises:
        ValueError: it takes no ``noise_sampler``, or has one.
    """
    others = f"These draw noise: {', '.join(drawing_samplers())}."
    if not isinstance(sampler, comfy.samplers.KSAMPLER):
        raise ValueError(
            f"the sampler is a {type(sampler).__name__} with a loop of its own, and CNS Noise cannot give it noise. "
            f"Choose another, or turn enable_cns off in CNS Noise. {others}"
        )
    function = sampler.sampler_function
    name = getattr(function, "__name__", type(function).__name__).removeprefix("sample_").removesuffix("_function")
    given = sampler.extra_options.get(ARGUMENT)
    if name == PASSED_ON:
        takes = bool(sampler.extra_options.get("eta"))
    else:
        argument = inspect.signature(function).parameters.get(ARGUMENT)
        takes = argument is not None
        if argument is not None and argument.default is not inspect.Parameter.empty:
            given = given or argument.default
    if not takes:
        raise ValueError(
            f"the sampler {name} draws no noise that CNS Noise could colour (it takes no {ARGUMENT}). Choose another, "
            f"CNS KSampler for Colored Noise Sampling itself, or turn enable_cns off in CNS Noise. {others}"
        )
    if given is not None:
        raise ValueError(
            f"the sampler {name} has noise of its own from another node ({ARGUMENT}), which CNS Noise would replace; "
            "leave one of the two out."
        )
    return name


def drawing_samplers() -> list[str]:
    """ComfyUI's own samplers whose noise can be coloured; without their twins that draw on the GPU."""
    named = {name: comfy.samplers.sampler_object(name).sampler_function for name in comfy.samplers.SAMPLER_NAMES}
    return [
        name
        for name, function in named.items()
        if name not in SILENT and not name.endswith("_gpu") and ARGUMENT in inspect.signature(function).parameters
    ]


def of_references(guider: Any, params: CNSParams) -> ProgressMatrix | None:
    """γ from the reference latents of a run's positive conditioning; None where it has none."""
    latents = [
        guider.inner_model.process_latent_in(latent)
        for options in guider.conds.get("positive", [])
        for latent in options.get("reference_latents", [])
    ]
    return reference_progress(latents, patch_size(guider.model_patcher), params.num_freq_bins) if latents else None


def _amount(function: Callable[..., Any], options: dict[str, Any]) -> bool:
    """Whether eta and s_noise, where the sampler has them, leave any noise."""
    parameters = inspect.signature(function).parameters
    for name in ("eta", "s_noise"):
        default = parameters[name].default if name in parameters else 1.0
        if options.get(name, default) == 0:
            return False
    return True
