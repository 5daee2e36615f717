"""Klein Decode: the picture at exactly the size asked for, and for masked edits the original outside the mask."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..klein.masks import blend_inside, fit_to_output
from ..klein.sizes import latent_size
from .common import CATEGORY, SIZE_KEY
from .pictures import check_latent, one_mask, one_picture


class KleinDecode(io.ComfyNode):
    """LATENT and VAE in, IMAGE out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KleinDecode",
            display_name="Klein Decode",
            category=CATEGORY,
            description="Decodes and crops to exactly the size asked for.",
            search_aliases=["vae decode", "crop"],
            inputs=[
                io.Latent.Input("latent", tooltip="The sampled latent."),
                io.Vae.Input("vae", tooltip="FLUX.2's VAE."),
                io.Image.Input("original", optional=True, tooltip="The picture whose pixels stay outside the mask."),
                io.Mask.Input("mask", optional=True, tooltip="Where the picture was edited; needs original."),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(
        cls, latent: dict[str, Any], vae: Any, original: Tensor | None = None, mask: Tensor | None = None
    ) -> io.NodeOutput:
        if mask is not None and original is None:
            raise ValueError("mask is connected but original is not; connect the picture that it was painted on.")
        check_latent("latent", latent["samples"])
        outside = None
        if original is not None and mask is not None:
            outside = fit_to_output(one_picture("original", original), one_mask(mask))
        image = crop(vae.decode(latent["samples"]), latent)
        if image.shape[-1] != 3:
            raise ValueError(f"vae decodes to {image.shape[-1]} channels, not 3; connect FLUX.2's VAE.")
        if outside:
            kept, where = (part.to(image) for part in outside)
            image = blend_inside(image.movedim(-1, 1), kept, where).movedim(1, -1)
        return io.NodeOutput(image)


def crop(image: Tensor, latent: dict[str, Any]) -> Tensor:
    """[B, H, W, 3] cut to the size that the latent records, unless the latent was resized since."""
    width, height = latent.get(SIZE_KEY, (image.shape[2], image.shape[1]))
    if latent_size(width, height) != tuple(latent["samples"].shape[-2:]):
        return image
    return image[:, :height, :width]
