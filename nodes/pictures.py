"""IMAGE, MASK and LATENT as the nodes take them: checked, and refused in words that name the input."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from ..klein.references import MAX_REFERENCES
from .cns_inputs import FLUX2_CHANNELS

SOCKET = re.compile(r"(?:images\.)?image_(\d+)")


def split_pictures(images: dict[str, Tensor], more: dict[str, Any]) -> list[Tensor]:
    """Each picture [1, 3, H, W], in socket order; empty sockets are skipped, a batch counts each of its pictures.

    Args:
        images: the growing sockets, as ComfyUI gives them.
        more: what else the API was given: sockets beyond the last, or names that do not exist.

    Raises:
        ValueError: more than four, no picture, or an unknown name.
    """
    sockets: dict[int, Tensor] = {}
    for name, value in {**images, **more}.items():
        known = SOCKET.fullmatch(name)
        if known is None:
            raise ValueError(
                f"the input {name!r} is unknown; pictures are images.image_0 to images.image_{MAX_REFERENCES - 1}."
            )
        if value is not None:
            sockets[int(known[1])] = value
    pictures = [
        picture[None]
        for socket, value in sorted(sockets.items())
        for picture in _channels_first(f"image_{socket}", value)
    ]
    if len(pictures) > MAX_REFERENCES:
        raise ValueError(
            f"{len(pictures)} pictures are connected (every picture of a batch counts); klein takes at most "
            f"{MAX_REFERENCES}. Disconnect some."
        )
    return pictures


def one_picture(name: str, image: Tensor) -> Tensor:
    """float32 [1, 3, H, W] of an IMAGE that must be one picture."""
    if len(image) != 1:
        raise ValueError(f"{name} holds {len(image)} pictures; connect one, for example through ImageFromBatch.")
    return _channels_first(name, image)


def one_mask(mask: Tensor) -> Tensor:
    """float32 [1, 1, H, W] of a MASK, which may lack its batch axis."""
    masks = mask.float().reshape(-1, 1, *mask.shape[-2:])
    if len(masks) != 1:
        raise ValueError(f"mask holds {len(masks)} masks; connect the one that belongs to the first picture.")
    return masks


def check_latent(name: str, samples: Tensor) -> None:
    """Refuse what is no latent of FLUX.2.

    Raises:
        ValueError: another number of channels.
    """
    if samples.shape[1] != FLUX2_CHANNELS:
        raise ValueError(
            f"{name} has {samples.shape[1]} channels, FLUX.2's have {FLUX2_CHANNELS}; it comes from another model or "
            "VAE. Load FLUX.2's with Klein 9B Base Loader."
        )


def _channels_first(name: str, image: Tensor) -> Tensor:
    """float32 [B, 3, H, W]; transparency is dropped, as ComfyUI's own nodes do."""
    if image.ndim != 4 or image.shape[-1] not in (3, 4) or 0 in image.shape:
        raise ValueError(
            f"{name} is {list(image.shape)}; a picture is [batch, height, width, 3 or 4 channels]. Connect an IMAGE, "
            "for example of Load Image."
        )
    return image[..., :3].movedim(-1, 1).float()
