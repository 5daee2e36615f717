"""Klein Multi-Image Edit: prompts and up to four pictures as conditioning, and the latent to fill."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_management
import node_helpers
import torch
from comfy_api.latest import io
from torch import Tensor

from ..endpoint import AUTO, DEFAULT_SIZE, IMAGE_SIZES, MAX_SIDE
from ..klein.cache import TensorCache
from ..klein.masks import fit_to_output, to_latent_mask
from ..klein.references import pad_edges, prepare_reference
from ..klein.sizes import MIN_SIDE, latent_size, output_size
from ..sampler.params import checked_number
from .common import CATEGORY, FLUX2_CHANNELS, SIZE_KEY
from .messages import SAYS, said
from .pictures import check_latent, one_mask, picture_inputs, split_pictures

CUSTOM = "custom"
MAX_KEPT = 256 * 2**20  # bytes of encodings for each CLIP and VAE; a prompt has 25 MB, a picture 2 MB

_encodings: WeakKeyDictionary[Any, TensorCache] = WeakKeyDictionary()


class KleinEditConditioner(io.ComfyNode):
    """CLIP, VAE, prompts and pictures in; positive, negative and latent out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KleinEditConditioner",
            display_name="Klein Multi-Image Edit",
            category=CATEGORY,
            description="Encodes the prompts and up to four pictures, and makes the latent of the result.",
            search_aliases=["klein edit", "reference latent", "flux2 edit"],
            inputs=[
                io.Clip.Input("clip", tooltip="klein's text encoder."),
                io.Vae.Input("vae", tooltip="FLUX.2's VAE."),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True, tooltip="What to make or change."),
                io.String.Input(
                    "negative_prompt", multiline=True, dynamic_prompts=True, default="", tooltip="What to avoid."
                ),
                *picture_inputs("A picture to edit or to refer to."),
                io.Mask.Input("mask", optional=True, tooltip="Where the first picture may change."),
                io.Combo.Input(
                    "image_size",
                    options=[AUTO, *IMAGE_SIZES, CUSTOM],
                    default=AUTO,
                    tooltip=f"auto: exactly the first picture's size, {DEFAULT_SIZE} without one. custom: width and "
                    "height.",
                ),
                io.Int.Input(
                    "width", default=1024, min=MIN_SIDE, max=MAX_SIDE, tooltip="Of the result, for custom. Any number."
                ),
                io.Int.Input(
                    "height", default=1024, min=MIN_SIDE, max=MAX_SIDE, tooltip="Of the result, for custom. Any number."
                ),
                io.Int.Input("num_images", default=1, min=1, max=4, tooltip="How many pictures to make."),
                io.Float.Input(
                    "reference_megapixels",
                    default=1.0,
                    min=0.1,
                    max=4.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Larger references are shrunk to this (1 = 1024 x 1024); none is enlarged.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(display_name="latent"),
            ],
            **SAYS,
        )

    @classmethod
    def execute(
        cls,
        clip: Any,
        vae: Any,
        prompt: str,
        negative_prompt: str,
        image_size: str,
        width: int,
        height: int,
        num_images: int,
        reference_megapixels: float,
        mask: Tensor | None = None,
        **images: Tensor,
    ) -> io.NodeOutput:
        checked_number("reference_megapixels", reference_megapixels, 0.1, 4.0)
        pictures, notes = split_pictures(images)
        first = (pictures[0].shape[-1], pictures[0].shape[-2]) if pictures else None
        size = output_size((width, height) if image_size == CUSTOM else image_size, first)
        references = [encode_picture(vae, prepare_reference(picture, reference_megapixels)) for picture in pictures]
        conditionings = []
        for text in (prompt, negative_prompt):
            conditioning = encode_text(clip, text)
            if references:
                conditioning = node_helpers.conditioning_set_values(conditioning, {"reference_latents": references})
            conditionings.append(conditioning)
        latent = empty_latent(size, num_images)
        if mask is not None:
            latent |= masked_latent(vae, pictures, one_mask(mask), image_size, num_images)
        if first and image_size == AUTO and size != first:
            was, now = (f"{width}x{height}" for width, height in (first, size))
            notes.append(f"{was} is scaled to {now}: a side has at most {MAX_SIDE} pixels.")
        return io.NodeOutput(*conditionings, latent, ui=said(*notes))


def encode_picture(vae: Any, pixels: Tensor) -> Tensor:
    """Normalised latent [1, 128, h, w] of a padded picture [1, 3, H, W]."""
    digest = hashlib.blake2b(pixels.cpu().contiguous().numpy().tobytes()).digest()
    key = (vae.patcher.patches_uuid, tuple(pixels.shape), digest)
    latent = _cached(vae, key, lambda: vae.encode(pixels.movedim(1, -1)))
    check_latent("the latent that vae encodes to", latent)
    return latent


def encode_text(clip: Any, text: str) -> Any:
    """CONDITIONING of a prompt."""
    key = (clip.patcher.patches_uuid, text)
    return _cached(clip, key, lambda: clip.encode_from_tokens_scheduled(clip.tokenize(text)))


def empty_latent(size: tuple[int, int], num_images: int) -> dict[str, Any]:
    """A LATENT of zeros that covers a picture of ``size`` (width, height), and remembers it."""
    samples = torch.zeros(
        num_images, FLUX2_CHANNELS, *latent_size(*size), device=comfy.model_management.intermediate_device()
    )
    return {"samples": samples, SIZE_KEY: size}


def masked_latent(vae: Any, pictures: list[Tensor], mask: Tensor, image_size: str, num_images: int) -> dict[str, Any]:
    """The first picture encoded, with the mask [1, 1, H, W] as noise mask [1, 1, h, w] of the latent's size.

    Raises:
        ValueError: no picture, another size than the picture's own, or a mask that is empty or of another size.
    """
    if not pictures:
        raise ValueError("a mask is connected but no picture; connect the picture that it was painted on.")
    if image_size != AUTO:
        raise ValueError(f"a mask edits the first picture in place, so image_size must be {AUTO}, not {image_size}.")
    picture = pictures[0]
    if not mask.any():  # what Load Image gives for a picture without one, at 64x64
        raise ValueError(
            "the mask is empty, so nothing may change; paint it (right-click the Load Image node, Open in Mask "
            "Editor), or disconnect it."
        )
    if mask.shape[-2:] != picture.shape[-2:]:
        raise ValueError(
            f"the mask is {mask.shape[-1]}x{mask.shape[-2]} and the first picture "
            f"{picture.shape[-1]}x{picture.shape[-2]}; draw the mask on that picture."
        )
    picture, mask = fit_to_output(picture, mask)
    samples = encode_picture(vae, pad_edges(picture))
    return {"samples": samples.repeat(num_images, 1, 1, 1), "noise_mask": to_latent_mask(pad_edges(mask))}


def _cached(encoder: Any, key: Hashable, encode: Callable[[], Any]) -> Any:
    """The encoding under ``key``, from those kept of this encoder; they live as long as the encoder."""
    kept = _encodings.setdefault(encoder, TensorCache(MAX_KEPT))
    return kept.get(key, encode, comfy.model_management.intermediate_device())
