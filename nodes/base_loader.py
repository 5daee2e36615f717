"""Klein 9B Base Loader: judges the three files by their headers, then loads them through ComfyUI."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..weights.architecture import KLEIN_9B
from ..weights.components import WANTED, check_pair, check_text_encoder, check_transformer, check_vae
from . import model_files
from .common import CATEGORY
from .messages import SAYS, said

DEVICES = ["default", "cpu"]


class KleinBaseLoader(io.ComfyNode):
    """Three files in, MODEL, CLIP and VAE out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KleinBaseLoader",
            display_name="Klein 9B Base Loader",
            category=CATEGORY,
            description=f"Loads {KLEIN_9B.name} Base: transformer, text encoder and VAE, checked before they are read.",
            search_aliases=["flux2 klein", "load klein", "unet loader"],
            inputs=[
                _combo("diffusion_model", "transformer"),
                _combo("text_encoder", "text_encoder"),
                _combo("vae", "vae"),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(model_files.WEIGHT_DTYPES),
                    default="default",
                    advanced=True,
                    tooltip="default keeps the file's own precision; fp8 halves the memory of a bf16 file.",
                ),
                io.Combo.Input(
                    "text_encoder_device",
                    options=DEVICES,
                    default="default",
                    advanced=True,
                    tooltip="cpu keeps the text encoder off the GPU: slower prompts, more free memory.",
                ),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
            **SAYS,
        )

    @classmethod
    def validate_inputs(cls, diffusion_model: str, text_encoder: str, vae: str) -> bool:
        return True  # a missing file fails when the node runs, with the list of what to get

    @classmethod
    def execute(
        cls, diffusion_model: str, text_encoder: str, vae: str, weight_dtype: str, text_encoder_device: str
    ) -> io.NodeOutput:
        names = {"transformer": diffusion_model, "text_encoder": text_encoder, "vae": vae}
        paths = _find_all(names)
        transformer = check_transformer(paths["transformer"])
        encoder = check_text_encoder(paths["text_encoder"])
        picture = check_vae(paths["vae"])
        check_pair(transformer, encoder)
        tiny = [part.file for part in (transformer, encoder, picture) if part.tiny]
        texts = [f"random test weights, the picture will be noise: {', '.join(tiny)}"] if tiny else []
        if transformer.distilled:
            texts.append(f"{diffusion_model} is the distilled klein, made for 4 steps at cfg 1, not Base.")
            logging.warning("klein-cns: %s", texts[-1])
        return io.NodeOutput(
            model_files.load_transformer(paths["transformer"], transformer, weight_dtype),
            model_files.load_text_encoder(paths["text_encoder"], encoder, text_encoder_device),
            model_files.load_vae(paths["vae"], picture),
            ui=said(*texts),
        )


def _combo(name: str, kind: str) -> io.Input:
    wanted, options = WANTED[kind], model_files.choices(kind)
    usual = [file for file, _ in wanted.sources]
    return io.Combo.Input(
        name,
        options=options,
        default=next((file for file in usual if file in options), usual[0]),
        tooltip=f"{wanted.what}: a file of models/{wanted.folder}/, or a diffusers folder of models/diffusers/.",
    )


def _find_all(names: dict[str, str]) -> dict[str, Path]:
    """The path of each file, or one error that lists all that is missing and where to get it."""
    paths: dict[str, Any] = {kind: model_files.find(kind, name) for kind, name in names.items()}
    missing = [f"{names[kind]!r} does not exist; {WANTED[kind].advice}" for kind, path in paths.items() if path is None]
    if missing:
        raise ValueError("\n".join(missing))
    return paths
