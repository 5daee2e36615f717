"""Masked edits: the original outside the mask, the edit inside, and a soft seam between."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..endpoint import AUTO
from .sizes import STRIDE, output_size

FEATHER = 8  # pixels over which the edit fades in, inside the mask


def fit_to_output(picture: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A picture and its mask at the size that ``auto`` makes of the picture; only a side over 2048 is scaled.

    Args:
        picture: [B, C, H, W], holds values in [0, 1].
        mask: [B, 1, H, W], is 1 where the picture may change.
    """
    height, width = picture.shape[-2:]
    wide, high = output_size(AUTO, (width, height))
    if (wide, high) == (width, height):
        return picture, mask
    picture = F.interpolate(picture, (high, wide), mode="bicubic", antialias=True).clamp(0, 1)
    return picture, F.interpolate(mask, (high, wide), mode="bilinear", antialias=True)


def to_latent_mask(mask: Tensor) -> Tensor:
    """A mask of latent cells: a cell may change where the mask touches it. Interpolation would miss thin strokes.

    Args:
        mask: [B, 1, H, W], is 1 where the picture may change; both sides are multiples of 16.

    Returns:
        [B, 1, H / 16, W / 16].
    """
    return F.max_pool2d(mask, STRIDE)


def blend_inside(edited: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """The edit where ``mask`` is 1; outside it the original's own values, bit for bit.

    The seam lies inside the mask: there the edit fades in over `FEATHER` pixels. A mask thinner than that keeps
    its full weight.

    Usage: ``blend_inside(edited, original, mask)``.

    Args:
        edited: [B, C, H, W], shows inside the mask.
        original: [1, C, H, W], shows outside it.
        mask: [1, 1, H, W], weighs the edit, in [0, 1].

    Raises:
        ValueError: the sizes differ.
    """
    sizes = [f"{part.shape[-1]}x{part.shape[-2]}" for part in (edited, original, mask)]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"the edit is {sizes[0]}, the original {sizes[1]} and the mask {sizes[2]}; they must have one size. "
            "Connect the picture that was edited (image_size auto) and its own mask."
        )
    window = 2 * FEATHER + 1
    padded = F.pad(mask, (FEATHER,) * 4, mode="replicate")
    share = F.avg_pool2d(padded, window, stride=1)
    fullest = F.max_pool2d(share * mask, window, stride=1, padding=FEATHER).clamp(min=1e-6)
    weight = mask * (2 * share / fullest - 1).clamp(0, 1)
    return original + weight * (edited - original)
