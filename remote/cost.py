"""What a request costs, before it is sent: $0.02 per megapixel (1024 x 1024) of input and output.

fal resizes every input to one megapixel and charges that, whatever its size.
"""

from __future__ import annotations

from collections.abc import Sequence

from .errors import NotAccepted
from .fields import AUTO, DEFAULT_SIZE, IMAGE_SIZES, MAX_SIDE

USD_PER_MEGAPIXEL = 0.02
MEGAPIXEL = 1024 * 1024


def output_size(image_size: str | tuple[int, int], sources: Sequence[tuple[int, int] | None]) -> tuple[int, int]:
    """(width, height) that fal will make; for ``auto`` and a source of unknown size the largest.

    Args:
        image_size: a preset, ``auto``, or (width, height).
        sources: (width, height) of each input, None for one that is only an address.
    """
    if isinstance(image_size, tuple):
        return image_size
    if image_size != AUTO:
        return IMAGE_SIZES[image_size]
    if not sources:
        return IMAGE_SIZES[DEFAULT_SIZE]
    width, height = sources[0] or (MAX_SIDE, MAX_SIDE)
    scale = min(1.0, MAX_SIDE / max(width, height))
    return round(width * scale), round(height * scale)


def cost_usd(size: tuple[int, int], num_images: int, inputs: int) -> float:
    """US dollars for ``num_images`` results of ``size`` from ``inputs`` pictures."""
    return USD_PER_MEGAPIXEL * (num_images * size[0] * size[1] / MEGAPIXEL + inputs)


def check_cost(cost: float, limit: float) -> None:
    """Raise `NotAccepted` where the cost is above the limit."""
    if not cost <= limit + 1e-9:  # so that NaN is no limit that everything passes
        raise NotAccepted(
            f"this request costs ${cost:.4f}, more than max_cost_usd {limit:g}; nothing was submitted. Raise "
            "max_cost_usd, or ask for fewer or smaller pictures."
        )
