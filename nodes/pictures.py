"""IMAGE, MASK and LATENT as the nodes take them: checked, and refused in words that name the input."""

from __future__ import annotations

import re
from collections.abc import Mapping

from comfy_api.latest import io
from torch import Tensor

from ..endpoint import MAX_IMAGES
from .common import FLUX2_CHANNELS

SOCKET = re.compile(r"(?:images\.)?image_(\d+)")  # ids count from 0, labels and prompts from 1


def picture_inputs(tooltip: str) -> list[io.Input]:
    """A socket for each picture. The sockets are fixed, so that disconnecting one renumbers no other."""
    counted = "The prompt counts the connected ones in this order, and each picture of a batch."
    return [
        io.Image.Input(
            f"images.image_{socket}", display_name=_label(socket), optional=True, tooltip=f"{tooltip} {counted}"
        )
        for socket in range(MAX_IMAGES)
    ]


def split_pictures(images: Mapping[str, Tensor | None]) -> tuple[list[Tensor], list[str]]:
    """(each picture [1, 3, H, W] in socket order, lines for the node where the prompt counts otherwise).

    The model and fal count pictures without gaps: an empty socket is skipped, and a batch counts each of its pictures.

    Args:
        images: holds the sockets by their ids, and extra inputs from an API prompt.

    Raises:
        ValueError: more than four, no picture, or an unknown name.
    """
    sockets: dict[int, Tensor] = {}
    for name, value in images.items():
        known = SOCKET.fullmatch(name)
        if known is None:
            raise ValueError(
                f"the input {name!r} is unknown; pictures are images.image_0 to images.image_{MAX_IMAGES - 1}."
            )
        if value is not None:
            sockets[int(known[1])] = value
    found = [
        (socket, picture[None])
        for socket, value in sorted(sockets.items())
        for picture in channels_first(_label(socket), value)
    ]
    if len(found) > MAX_IMAGES:
        raise ValueError(
            f"{len(found)} pictures are connected (every picture of a batch counts); klein takes at most "
            f"{MAX_IMAGES}. Disconnect some."
        )
    moved = [
        f"{_label(number)} of the prompt is at the socket {_label(socket)}"
        for number, (socket, _) in enumerate(found)
        if number != socket
    ]
    counted = [f"The prompt counts pictures without gaps: {'; '.join(moved)}."] if moved else []
    return [picture for _, picture in found], counted


def channels_first(name: str, image: Tensor) -> Tensor:
    """float32 [B, 3, H, W]; transparency is dropped, as ComfyUI's own nodes do."""
    if image.ndim != 4 or image.shape[-1] not in (3, 4) or 0 in image.shape:
        raise ValueError(
            f"{name} is {list(image.shape)}; a picture is [batch, height, width, 3 or 4 channels]. Connect an IMAGE, "
            "for example of Load Image."
        )
    return image[..., :3].movedim(-1, 1).float()


def one_picture(name: str, image: Tensor) -> Tensor:
    """float32 [1, 3, H, W] of an IMAGE that must be one picture."""
    if len(image) != 1:
        raise ValueError(f"{name} holds {len(image)} pictures; connect one, for example through ImageFromBatch.")
    return channels_first(name, image)


def one_mask(mask: Tensor) -> Tensor:
    """float32 [1, 1, H, W] of a MASK, which may lack its batch axis."""
    masks = mask.float().reshape(-1, 1, *mask.shape[-2:])
    if len(masks) != 1:
        raise ValueError(f"mask holds {len(masks)} masks; connect the one that belongs to the first picture.")
    return masks


def check_latent(name: str, samples: Tensor) -> None:
    """Refuse anything that is not a FLUX.2 latent.

    Raises:
        ValueError: another number of channels.
    """
    if samples.shape[1] != FLUX2_CHANNELS:
        raise ValueError(
            f"{name} has {samples.shape[1]} channels, FLUX.2's have {FLUX2_CHANNELS}; it comes from another model or "
            "VAE. Use the model and the VAE that Klein 9B Base Loader loads."
        )


def _label(socket: int) -> str:
    return f"picture {socket + 1}"
