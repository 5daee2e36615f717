"""The ComfyUI surface. A node converts types and calls the core; one file a node, no mathematics here."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io

from .base_loader import KleinBaseLoader
from .before_run import edit, fal, price
from .cns_inputs import add_gamma_folder
from .cns_ksampler import CNSKSampler
from .cns_noise import CNSNoise
from .cns_sampler import CNSSampler
from .cns_spectrum import CNSSpectrum
from .decode import KleinDecode
from .edit_conditioner import KleinEditConditioner
from .example_pictures import add_example_pictures
from .fal_edit import KleinFalEdit
from .fal_requests import KleinFalRequests
from .lora_stack import KleinLoraStack
from .noise_picture import presets, preview
from .plain_errors import with_plain_errors
from .replacements import register_replacements
from .route import KleinRoute
from .routes import add_route

add_gamma_folder()
ROUTES = {"noise": preview, "presets": presets, "edit": edit, "price": price, "fal": fal}


class KleinExtension(ComfyExtension):
    """The pack as ComfyUI loads it."""

    async def on_load(self) -> None:
        await register_replacements()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        add_example_pictures(Path(folder_paths.get_input_directory()))  # ComfyUI 0.11 does not call on_load
        for name, answer in ROUTES.items():
            add_route(name, answer)
        local = [KleinBaseLoader, KleinLoraStack, KleinEditConditioner, CNSKSampler, CNSSampler, CNSNoise, KleinDecode]
        return [with_plain_errors(node) for node in (*local, KleinFalEdit, KleinFalRequests, KleinRoute, CNSSpectrum)]
