"""Picture sizes: the endpoint's presets, exact sizes, and the latent that covers them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..endpoint import AUTO, DEFAULT_SIZE, IMAGE_SIZES, MAX_SIDE
from ..sampler.params import checked_number

MIN_SIDE = 64  # pixels
STRIDE = 16  # pixels of one latent position: 8 of the VAE, 2 of the patches


def parse_image_size(value: Any) -> str | tuple[int, int]:
    """A preset's name, ``auto`` (or None), or (width, height) from a pair, ``{"width", "height"}`` or ``"1024x768"``.

    >>> parse_image_size("1024x768")
    (1024, 768)

    Raises:
        ValueError: the value is anything else, or a side is outside 64 to 2048.
    """
    if value is None or value == AUTO:
        return AUTO
    if isinstance(value, str) and value in IMAGE_SIZES:
        return value
    if isinstance(value, str) and re.fullmatch(r"\d+x\d+", value):
        value = tuple(int(side) for side in value.split("x"))
    if isinstance(value, Mapping) and set(value) == {"width", "height"}:
        value = (value["width"], value["height"])
    if not (isinstance(value, (tuple, list)) and len(value) == 2):
        raise ValueError(
            f"image_size is {value!r}; allowed are {AUTO}, {', '.join(IMAGE_SIZES)}, or width and height "
            f"from {MIN_SIDE} to {MAX_SIDE}."
        )
    width, height = value
    return (
        checked_number("image_size width", width, MIN_SIDE, MAX_SIDE, whole=True),
        checked_number("image_size height", height, MIN_SIDE, MAX_SIDE, whole=True),
    )


def output_size(image_size: str | tuple[int, int], first_picture: tuple[int, int] | None) -> tuple[int, int]:
    """(width, height) to make: a preset's, the one given, or for ``auto`` the first picture's own.

    A picture with a side over 2048 is scaled down to fit; without a picture ``auto`` is landscape_4_3.

    >>> output_size("auto", (4096, 2048))
    (2048, 1024)

    Args:
        image_size: a preset's name, ``auto`` or (width, height), from `parse_image_size`.
        first_picture: (width, height) in pixels; None where there is no picture.

    Raises:
        ValueError: the size is ``auto``, and a side of the result would be under 64.
    """
    if isinstance(image_size, tuple):
        return image_size
    if image_size != AUTO:
        return IMAGE_SIZES[image_size]
    if first_picture is None:
        return IMAGE_SIZES[DEFAULT_SIZE]
    scale = min(1.0, MAX_SIDE / max(first_picture))
    width, height = (min(round(side * scale), MAX_SIDE) for side in first_picture)
    if min(width, height) < MIN_SIDE:
        raise ValueError(
            f"the first picture is {first_picture[0]}x{first_picture[1]}, which would make {width}x{height}; a side "
            f"must have at least {MIN_SIDE} pixels. Give an image_size, for example {DEFAULT_SIZE}."
        )
    return width, height


def latent_size(width: int, height: int) -> tuple[int, int]:
    """(height, width) of the smallest latent that covers a picture of so many pixels.

    >>> latent_size(1024, 760)
    (48, 64)
    """
    return -(-height // STRIDE), -(-width // STRIDE)
