"""Acceleration inside ComfyUI's own guider, and what to say of the caches that a model may carry."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from ..sampler.acceleration import ACCELERATION_HELP, Accelerator, Action, Plan, plan
from ..sampler.params import LEVELS

BATCH_FUNCTION = "sampler_calc_cond_batch_function"  # ComfyUI's hook around the predictions of all conditionings
PREDICTS = ("__call__", "outer_predict_noise", "predict_noise")  # of a guider
FLUX_KV = "Flux KV Cache"


def acceleration_input() -> io.Input:
    """The widget that chooses a level. Optional, so that prompts saved without it still run."""
    return io.Combo.Input(
        "acceleration", options=list(LEVELS), default=LEVELS[0], optional=True, advanced=True, tooltip=ACCELERATION_HELP
    )


def plan_run(level: str, model: Any, sigmas: Tensor, solver: str, extra_args: Mapping[str, Any]) -> Plan:
    """The plan of a run.

    Args:
        level: one of `LEVELS`.
        model: what ComfyUI's KSAMPLER hands to a sampler, a guider inside a ``KSamplerX0Inpaint``.
        extra_args: what the sampler gives to each call of the model.

    Raises:
        ValueError: a guider, a cache or a patch that the level cannot be combined with; the message says what to do.
    """
    guider, options = model.inner_model, extra_args.get("model_options", {})
    if level == "none":
        return plan(level, sigmas, 1.0, solver)
    _refuse_guider(level, guider)
    made = plan(level, sigmas, _guidance(guider), solver)
    _refuse_patches(made, options, extra_args.get("denoise_mask") is not None)
    return made


def accelerate(accelerator: Accelerator, model: Any, extra_args: Mapping[str, Any]) -> dict[str, Any]:
    """``extra_args`` that let the accelerator decide which conditionings the model is called with.

    Nothing of what was given is changed. The cfg and post-cfg functions of other packs run as ever: they get an
    unconditional prediction at every step, also where it was not computed.
    """
    guider, options = model.inner_model, extra_args.get("model_options", {})
    cfg, predict = guider.cfg, options.get(BATCH_FUNCTION, _predict)

    def predict_planned(args: dict[str, Any]) -> list[Tensor]:
        if guider.cfg != cfg:
            raise ValueError(
                f"acceleration is {accelerator.plan.level!r}, but cfg changes from {cfg:g} to {guider.cfg:g} during "
                "the run; set acceleration to 'none', or take out what changes it (such as CFG Override)."
            )
        positive, negative = args["conds"]
        if negative is None:
            return predict(args)
        asked = negative if accelerator.needs_unconditional else None
        conditional, unconditional, *others = predict({**args, "conds": [positive, asked]})
        return [conditional, accelerator.unconditional(conditional, lambda: unconditional), *others]

    return {**extra_args, "model_options": {**options, BATCH_FUNCTION: predict_planned}}


def interruptible(callback: Callable[[dict[str, Any]], None] | None) -> Callable[[dict[str, Any]], None]:
    """A callback that stops an interrupted run, also at a step that calls no model."""

    def call(event: dict[str, Any]) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if callback is not None:
            callback(event)

    return call


def cache_advice(model: Any, extra_args: Mapping[str, Any], churn: float) -> list[str]:
    """One sentence for each of ComfyUI's caches that does harm in this run; empty for most runs.

    Args:
        model, extra_args: see `plan_run`.
        churn: s_churn, 0 where no noise is injected.
    """
    guider = model.inner_model
    found = []
    for name in caches(extra_args.get("model_options", {})):
        if name == "LazyCache" and churn > 0:
            found.append(
                "LazyCache repeats the noise of an earlier step where noise is injected; use acceleration 'high' in "
                "its place, or set cns_s_churn to 0."
            )
        elif name == "EasyCache" and _dtype(guider.inner_model) == torch.float32:
            found.append(
                "EasyCache spoils the latent at every step that it skips where the model computes in float32; let it "
                "compute in bfloat16, or use acceleration in its place."
            )
        elif name == FLUX_KV and _guidance(guider) != 1:
            found.append(
                f"{FLUX_KV} is for models that were trained with it. FLUX.2 [klein] Base was not, and sees its "
                "reference pictures wrongly then; take it out."
            )
    return found


def caches(options: Mapping[str, Any]) -> list[str]:
    """The names of ComfyUI's caches on a model, from its ``model_options``."""
    inside = options.get("transformer_options", {})
    holder = inside.get("easycache")  # of EasyCache and LazyCache alike
    found = [] if holder is None else [str(getattr(holder, "name", "EasyCache"))]
    # By its name: ComfyUI loads its own nodes from their files, so that an import here would be another class.
    if any(type(patch).__name__ == "KV_Attn_Input" for patch in inside.get("patches", {}).get("attn1_patch", [])):
        found.append(FLUX_KV)
    return found


def _predict(args: dict[str, Any]) -> list[Tensor]:
    """What ComfyUI's ``sampling_function`` does without the hook."""
    return comfy.samplers.calc_cond_batch(
        args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
    )


def _guidance(guider: Any) -> float:
    """cfg, or 1 where ComfyUI computes no unconditional prediction."""
    negative = getattr(guider, "conds", {}).get("negative")
    return 1.0 if negative is None or math.isclose(guider.cfg, 1.0) else float(guider.cfg)


def _refuse_guider(level: str, guider: Any) -> None:
    plain = comfy.samplers.CFGGuider
    if any(getattr(type(guider), name, None) is not getattr(plain, name) for name in PREDICTS):
        raise ValueError(
            f"acceleration is {level!r}, but the guider is a {type(guider).__name__}, which combines predictions in a "
            "way of its own; set acceleration to 'none', or use CFGGuider or BasicGuider."
        )


def _refuse_patches(made: Plan, options: Mapping[str, Any], masked: bool) -> None:
    names: Sequence[str] = caches(options)
    if names:
        raise ValueError(
            f"acceleration is {made.level!r}, but the model has {names[0]}, which reuses predictions by itself; set "
            f"acceleration to 'none', or take {names[0]} out."
        )
    if options.get("disable_cfg1_optimization", False):
        raise ValueError(
            f"acceleration is {made.level!r}, but a patch on the model needs the unconditional prediction computed at "
            "every step (it turns off ComfyUI's shortcut at cfg 1); set acceleration to 'none', or take the patch out."
        )
    if masked and "denoise_mask_function" in options and Action.EXTRAPOLATED in made.actions:
        raise ValueError(
            f"acceleration is {made.level!r}, but a patch on the model changes the mask from step to step (as "
            "Differential Diffusion does); choose 'regular' or 'none', or take the patch out."
        )


def _dtype(model: Any) -> torch.dtype:
    """What a model of ComfyUI computes in."""
    return model.get_dtype() if model.manual_cast_dtype is None else model.manual_cast_dtype
