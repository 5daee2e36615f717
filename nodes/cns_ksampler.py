"""CNS KSampler: the KSampler of klein, with its own schedules and Colored Noise Sampling."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io

from ..sampler import CNSParams, reference_progress
from ..sampler.params import checked_number
from .acceleration import acceleration_input
from .cns_inputs import cns_inputs, gamma_stamp, load_progress, patch_size, solver_input
from .cns_sampler import sample
from .common import CATEGORY
from .messages import SAYS, said
from .noise_picture import KEY, measured
from .schedule import MAX_STEPS, SCHEDULERS, make_sigmas

EMPTY_RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # what ComfyUI's empty latents carry


class CNSKSampler(io.ComfyNode):
    """MODEL, CONDITIONING and LATENT in, LATENT out, like KSampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CNSKSampler",
            display_name="CNS KSampler",
            category=CATEGORY,
            description="Samples with klein's own schedule, with or without Colored Noise Sampling.",
            search_aliases=["klein sampler", "colored noise", "flux2 ksampler"],
            inputs=[
                io.Model.Input("model", tooltip="The model that denoises."),
                io.Conditioning.Input("positive", tooltip="What to make, with the reference pictures."),
                io.Conditioning.Input("negative", tooltip="What to avoid, with the same reference pictures."),
                io.Latent.Input("latent_image", tooltip="The latent to start from; its size is the picture's."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Where the noise starts, the initial and the injected.",
                ),
                io.Int.Input("steps", default=28, min=1, max=MAX_STEPS, tooltip="Denoising steps."),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Classifier-free guidance; klein Base likes 4 to 5. 1 is none and takes half the time.",
                ),
                solver_input(),
                io.Combo.Input(
                    "scheduler",
                    options=list(SCHEDULERS),
                    default="flux2",
                    tooltip="flux2 is klein's own schedule, log_snr one for few steps, about 12, of solver sde_3m. The "
                    "others are ComfyUI's, with a fixed shift.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 only the last part of the schedule runs, and the latent is kept in part.",
                ),
                *cns_inputs(),
                acceleration_input(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent"),
                io.Latent.Output(display_name="denoised", tooltip="The last prediction of the finished picture."),
            ],
            **SAYS,
        )

    @classmethod
    def validate_inputs(cls, cns_gamma_file: str) -> bool:
        return True  # a missing file fails when the node runs, with the remedy

    @classmethod
    def fingerprint_inputs(cls, cns_gamma_file: str, **inputs: Any) -> Any:
        return gamma_stamp(cns_gamma_file)

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        seed: int,
        steps: int,
        cfg: float,
        solver: str,
        scheduler: str,
        denoise: float,
        cns_gamma_file: str,
        acceleration: str = "none",
        **values: Any,
    ) -> io.NodeOutput:
        checked_number("cfg", cfg, 0.0, 100.0)
        params = CNSParams.from_endpoint(values)
        progress = load_progress(params, cns_gamma_file)
        references = reference_latents(positive, model)
        if params.enable_cns and params.gamma_source == "reference" and references:
            progress = reference_progress(references, patch_size(model), params.num_freq_bins)
        latent = latent_image.copy()
        ratios = {name: latent.pop(name) for name in EMPTY_RATIOS if name in latent}
        samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)
        channels = model.get_model_object("latent_format").latent_channels
        if samples.shape[1] != channels:
            raise ValueError(
                f"latent_image has {samples.shape[1]} channels, the model takes {channels}; make the latent with Klein "
                "Multi-Image Edit, or encode the picture with this model's VAE."
            )
        tokens = samples.shape[-2] * samples.shape[-1]
        sigmas = make_sigmas(model.get_model_object("model_sampling"), scheduler, steps, denoise, tokens)
        batch_index = latent.get("batch_index")
        noise = comfy.sample.prepare_noise(samples, seed, batch_index)
        told: list[str] = []
        numbers: dict[str, Any] = {}

        def tell(lines: list[str], **more: Any) -> None:
            told.extend(lines)
            numbers.update(more)

        options = {
            "params": params,
            "solver": solver,
            "acceleration": acceleration,
            "progress": progress,
            "batch_index": batch_index,
            "tell": tell,
        }
        x0: dict[str, torch.Tensor] = {}
        result = comfy.sample.sample_custom(
            model,
            noise,
            cfg,
            comfy.samplers.KSAMPLER(sample, options),
            sigmas,
            positive,
            negative,
            samples,
            noise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, len(sigmas) - 1, x0),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        denoised = model.model.process_latent_out(x0["x0"].cpu()) if x0 else result
        if numbers.get(KEY):
            numbers[KEY] |= measured(model.model.process_latent_in(result), references, patch_size(model), params)
        return io.NodeOutput({**latent, "samples": result}, {**latent, "samples": denoised}, ui=said(*told, **numbers))


def reference_latents(conditioning: Any, model: Any) -> list[torch.Tensor]:
    """The reference latents that a conditioning carries, scaled as the model sees them."""
    return [
        model.model.process_latent_in(latent)
        for _, options in conditioning
        for latent in options.get("reference_latents", [])
    ]
