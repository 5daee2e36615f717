"""Finding and loading the components of a klein for the diffusers host."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..weights.architecture import COMPONENTS, DEV, KLEIN_9B, LATENT_CHANNELS, recognize
from .memory import is_out_of_memory, memory_advice
from .tiny import tiny
from .words import first_line

if TYPE_CHECKING:
    from diffusers import Flux2KleinPipeline

HUB_ID = "black-forest-labs/FLUX.2-klein-base-9B"
HELP = f"give a diffusers folder, a Hub id such as {HUB_ID}, or 'tiny' for random test weights"
LESS_MEMORY = (
    "load the model with cpu_offload (--cpu-offload) or in bfloat16 (--dtype bfloat16), and close what else uses memory"
)


def load_components(
    model: str, torch_dtype: torch.dtype | None, device: str | torch.device | None, cpu_offload: bool
) -> Flux2KleinPipeline:
    """The components on their device; arguments and errors are those of `KleinPipeline.from_pretrained`."""
    device = _usable_device(device) if device is not None else default_device()
    if torch_dtype is None:
        torch_dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if cpu_offload and device.type == "cpu":
        raise ValueError("cpu_offload needs an accelerator to offload from; leave it out on the CPU.")
    with memory_advice(LESS_MEMORY):
        pipe = _tiny(torch_dtype) if model == "tiny" else _from_pretrained(model, torch_dtype)
    if pipe.config.is_distilled:
        warnings.warn(
            f"{model} is the distilled klein, made for 4 steps at guidance 1; the settings here are for Base.",
            stacklevel=3,
        )
    with memory_advice(LESS_MEMORY):
        if cpu_offload:
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.to(device)
    return pipe


def check_components(transformer: dict[str, Any], text_encoder: dict[str, Any], vae: dict[str, Any]) -> None:
    """Refuse components that cannot work together.

    Args:
        transformer, text_encoder, vae: hold the config of each, as diffusers and transformers write it.

    Raises:
        ValueError: the transformer is not a klein, the text encoder has another width, or the VAE is not FLUX.2's.
    """
    hidden = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    context, width = transformer["joint_attention_dim"], text_encoder["hidden_size"]
    known = recognize(hidden, context)
    name = known.name if known else f"FLUX.2 transformer of hidden width {hidden}"
    if known is DEV or transformer.get("guidance_embeds"):
        raise ValueError(f"the transformer is {name} with a guidance embedding; load {KLEIN_9B.name} Base.")
    if context != 3 * width:
        wanted = f"{known.text_encoder} (width {known.text_width})" if known else f"one of width {context / 3:g}"
        raise ValueError(
            f"the text encoder has width {width}, but {name} was trained with {wanted}; "
            "put that model into the folder text_encoder."
        )
    if vae.get("latent_channels") != LATENT_CHANNELS:
        raise ValueError(
            f"the VAE has {vae.get('latent_channels')} latent channels, FLUX.2's has {LATENT_CHANNELS}; "
            "put FLUX.2's VAE into the folder vae."
        )


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    accelerators = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}
    return torch.device(next((name for name, backend in accelerators.items() if backend.is_available()), "cpu"))


def _usable_device(name: str | torch.device) -> torch.device:
    """The device, tried out: a build without it says so only when it is used."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {str(name)!r} cannot be used ({first_line(error)}); leave it out, or give cpu, cuda, xpu or mps."
        ) from error


def _tiny(torch_dtype: torch.dtype) -> Flux2KleinPipeline:
    pipe = tiny()
    for part in COMPONENTS:
        torch.nn.Module.to(getattr(pipe, part), torch_dtype)
    return pipe


def _from_pretrained(model: str, torch_dtype: torch.dtype) -> Flux2KleinPipeline:
    import diffusers
    from diffusers import Flux2KleinPipeline
    from packaging.version import Version
    from safetensors import SafetensorError

    folder = Path(model)
    if folder.exists():
        check_components(*_read_configs(folder))  # before gigabytes are read
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ValueError(f"model {model!r} does not exist; {HELP}.")
    renamed = Version(diffusers.__version__) >= Version("0.42")  # torch_dtype became dtype
    try:
        pipe = Flux2KleinPipeline.from_pretrained(
            model, use_safetensors=True, **{"dtype" if renamed else "torch_dtype": torch_dtype}
        )
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        reason = first_line(error).partition(" (")[0]
        hint = (
            "download its folder again"
            if folder.exists()
            else (
                "check the network, accept the model's licence on its page and log in with `hf auth login`, "
                "or give a folder that holds it"
            )
        )
        raise ValueError(f"model {model!r} cannot be loaded ({reason}); {hint}.") from error
    check_components(pipe.transformer.config, pipe.text_encoder.config.to_dict(), pipe.vae.config)
    return pipe


def _read_configs(folder: Path) -> list[dict[str, Any]]:
    index = _read_json(folder, folder / "model_index.json")
    if index.get("_class_name") != "Flux2KleinPipeline":
        raise ValueError(f"{folder} is a {index.get('_class_name')} folder, not a Flux2KleinPipeline; {HELP}.")
    return [_read_json(folder, folder / part / "config.json") for part in COMPONENTS]


def _read_json(folder: Path, path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        name = path.relative_to(folder)
        raise ValueError(f"{folder} has no readable {name}, so it is not a whole diffusers folder; {HELP}.") from error
