"""What Klein Multi-Image Edit and Klein on fal show before a run: sizes and tokens, the price, and open requests."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import folder_paths

from ..endpoint import AUTO, MAX_IMAGES
from ..klein.references import fitted_size
from ..klein.sizes import latent_size, output_size, parse_image_size
from ..remote import key
from ..remote.errors import JournalError
from ..remote.fields import CUSTOM
from ..remote.journal import overview
from ..sampler.params import checked_number
from .fal_edit import FOLDER
from .fal_requests import SESSION

MOST_SIDE = 65536  # pixels of a picture
MOST_OPEN = 20  # requests that are listed


def edit(values: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of the route ``edit``: what Klein Multi-Image Edit will make.

    Args:
        values: hold the widgets ``image_size``, ``width``, ``height`` and ``reference_megapixels``, and ``pictures``, a
            list of [width, height], or null where that is not known. Without ``image_size`` the size is not known.

    Returns:
        ``size``, [width, height] of the result, and ``tokens``, the positions that it takes in the model, both None
        where they are not known; ``references``: the tokens of each picture, None where they are not known;
        ``together``: the sum of what is known, and ``complete``, whether that is all.

    Raises:
        ValueError: a value is out of range, or the result would be too small.
    """
    pictures = _pictures(values)
    megapixels = checked_number("reference_megapixels", values.get("reference_megapixels", 1.0), 0.1, 4.0)
    size = _image_size(values)
    unknown = size is None or (size == AUTO and bool(pictures) and pictures[0] is None)
    made = None if size is None or unknown else output_size(size, pictures[0] if pictures else None)
    tokens = None if made is None else _tokens(made)
    references = [None if one is None else _tokens(fitted_size(*one, megapixels)) for one in pictures]
    known = [count for count in (tokens, *references) if count is not None]
    return {
        "size": made,
        "tokens": tokens,
        "references": references,
        "together": sum(known),
        "complete": len(known) == 1 + len(references),
    }


def price(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The answer of the route ``price``: what fal will charge for a run of Klein on fal.

    Args:
        values: hold ``image_size``, ``width``, ``height``, ``num_images`` and ``pictures`` as in `edit`, and
            ``addresses``, the number of pictures that fal fetches after those.

    Returns:
        ``usd``, None where the size is not known, and ``at_most``, whether it may be less; None in place of both where
        the packages of Klein on fal are not installed.

    Raises:
        ValueError: a value is out of range.
    """
    addresses = checked_number("addresses", values.get("addresses", 0), 0, MAX_IMAGES, whole=True)
    sources = [*_pictures(values), *[None] * addresses]
    if len(sources) > MAX_IMAGES:
        raise ValueError(f"{len(sources)} pictures are given; the endpoint takes at most {MAX_IMAGES}. Leave some out.")
    num_images = checked_number("num_images", values.get("num_images", 1), 1, MAX_IMAGES, whole=True)
    size = _image_size(values)
    try:
        from ..remote.order import price_usd
    except ImportError:
        return None
    if size is None:
        return {"usd": None, "at_most": False}
    return {"usd": price_usd(size, sources, num_images), "at_most": size == AUTO and bool(sources)}


def fal(values: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of the route ``fal``: whether there is a key, and what is open. It only reads.

    Returns:
        ``key``: whether a usable one is there. ``open``: at most 20 requests, newest first, that were submitted and not
        collected, each with ``request_id`` (None where fal's answer was lost), ``age_s`` and ``cost_usd`` (None where
        it is unknown); ``count`` of all. ``fault``: whether the journal cannot be read; nothing is listed then.
    """
    folder = Path(folder_paths.get_system_user_directory(FOLDER))
    there = key.has_key(os.environ, folder / key.FILE)
    try:
        found = overview(folder, SESSION, datetime.now().astimezone())["open"]
    except JournalError:
        return {"key": there, "open": [], "count": 0, "fault": True}
    shown = [{name: one[name] for name in ("request_id", "age_s", "cost_usd")} for one in found[:MOST_OPEN]]
    return {"key": there, "open": shown, "count": len(found), "fault": False}


def _tokens(size: tuple[int, int]) -> int:
    """Positions in the model that a picture of (width, height) takes."""
    height, width = latent_size(*size)
    return height * width


def _image_size(values: Mapping[str, Any]) -> str | tuple[int, int] | None:
    """The widget's size; None where it is not known."""
    size = values.get("image_size")
    if size != CUSTOM:
        return None if size is None else parse_image_size(size)
    sides = values.get("width"), values.get("height")
    return None if None in sides else parse_image_size(sides)


def _pictures(values: Mapping[str, Any]) -> list[tuple[int, int] | None]:
    given = values.get("pictures", [])
    if not isinstance(given, list) or len(given) > MAX_IMAGES:
        raise ValueError(f"pictures must be a list of at most {MAX_IMAGES} sizes.")
    found: list[tuple[int, int] | None] = []
    for one in given:
        if one is not None and not (isinstance(one, list) and len(one) == 2):
            raise ValueError(f"a picture is {str(one)[:80]}; give [width, height], or null where it is not known.")
        sides = (
            None if one is None else [checked_number("a side of pictures", s, 1, MOST_SIDE, whole=True) for s in one]
        )
        found.append(None if sides is None else (sides[0], sides[1]))
    return found
