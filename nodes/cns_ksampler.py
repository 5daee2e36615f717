"""CNS KSampler: the KSampler of klein, with its own schedules and Colored Noise Sampling."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io
from comfy_extras.nodes_flux import get_schedule

from ..klein.schedules import SCHEDULES, log_snr_sigmas
from ..sampler import CNSParams, ProgressMatrix, reference_progress
from .cns_inputs import CATEGORY, GAMMA_FILE, cns_inputs, cns_params, load_progress, patch_size
from .cns_sampler import make_sampler


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
                    "seed", default=0, min=0, max=2**64 - 1, control_after_generate=True,
                    tooltip="Where the noise starts, the initial and the injected.",
                ),
                io.Int.Input("steps", default=28, min=1, max=10000, tooltip="Denoising steps."),
                io.Float.Input(
                    "cfg", default=5.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="Classifier-free guidance; klein Base likes 4 to 5. 1 is none and takes half the time.",
                ),
                io.Combo.Input(
                    "scheduler", options=[*SCHEDULES, *comfy.samplers.SCHEDULER_NAMES], default="flux2",
                    tooltip="flux2 is klein's own schedule, log_snr an experiment that is more exact at few steps. The "
                    "others are ComfyUI's, with a fixed shift.",
                ),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Below 1 only the last part of the schedule runs, and the latent is kept in part.",
                ),
                *cns_inputs(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent"),
                io.Latent.Output(display_name="denoised", tooltip="The last prediction of the finished picture."),
            ],
        )

    @classmethod
    def validate_inputs(cls, cns_gamma_file: str) -> bool:
        return True  # a missing file fails when the node runs, with the remedy

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
        scheduler: str,
        denoise: float,
        **values: Any,
    ) -> io.NodeOutput:
        params = cns_params(values)
        progress = load_progress(params, values[GAMMA_FILE])
        if params.enable_cns and params.gamma_source == "reference":
            progress = conditioning_progress(params, positive, patch_size(model))
        latent = latent_image.copy()
        samples = comfy.sample.fix_empty_latent_channels(
            model, latent["samples"],
            latent.pop("downscale_ratio_spacial", None), latent.pop("downscale_ratio_temporal", None),
        )
        sigmas = make_sigmas(model, scheduler, steps, denoise, samples)
        batch_index = latent.get("batch_index")
        noise = comfy.sample.prepare_noise(samples, seed, batch_index)
        x0: dict[str, torch.Tensor] = {}
        result = comfy.sample.sample_custom(
            model, noise, cfg, make_sampler(params, progress, batch_index=batch_index), sigmas, positive, negative,
            samples,
            noise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, len(sigmas) - 1, x0),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        denoised = model.model.process_latent_out(x0["x0"].cpu()) if x0 else result
        return io.NodeOutput({**latent, "samples": result}, {**latent, "samples": denoised})


def make_sigmas(model: Any, scheduler: str, steps: int, denoise: float, samples: torch.Tensor) -> torch.Tensor:
    """float32 [steps + 1]; below denoise 1 the last steps + 1 sigmas of a schedule of int(steps / denoise)."""
    if denoise <= 0:
        return torch.FloatTensor([])
    total = steps if denoise >= 1 else int(steps / denoise)
    tokens = samples.shape[-2] * samples.shape[-1]
    if scheduler == "flux2":
        sigmas = get_schedule(total, tokens)  # ComfyUI's own, for its bits
    elif scheduler == "log_snr":
        sigmas = torch.from_numpy(log_snr_sigmas(total, tokens))
    else:
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, total).cpu()
    return sigmas[-(steps + 1) :]


def conditioning_progress(params: CNSParams, conditioning: Any, patch: int) -> ProgressMatrix | None:
    """γ from the reference latents that a conditioning carries; None without any."""
    latents = [latent for _, options in conditioning for latent in options.get("reference_latents", [])]
    return reference_progress(latents, patch, params.num_freq_bins) if latents else None
