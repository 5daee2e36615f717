"""What a run asks for, checked, priced and hashed before anything is sent."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
from PIL import Image

from .errors import NotAccepted
from .fields import (
    AUTO,
    DEFAULT_SIZE,
    EDIT_ENDPOINT,
    IMAGE_SIZES,
    MAX_IMAGES,
    MAX_LORAS,
    MAX_SIDE,
    TEXT_ENDPOINT,
)
from .pictures import pixel_digest
from .request import EditRequest, TextRequest, body, refusal

_ADDRESS = re.compile(r"https?://\S+|data:image/\S+")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
USD_PER_MEGAPIXEL = 0.02  # of input and output; fal resizes every input to one megapixel and charges that
MEGAPIXEL = 1024 * 1024


@dataclass(frozen=True)
class Order:
    """One remote run.

    Args:
        endpoint: fal's id of it.
        arguments: the request without pictures and LoRAs.
        pictures: each a picture, or an address that fal fetches.
        loras: each a file, or an address or repository that fal fetches, with its scale.
        size: (width, height) of the result where it was chosen; None for ``auto``.
        cost_usd: what fal will charge, at most.
        fingerprint: hash of all that decides the result; the same for the same pixels and file contents, however a size
            is named and however the pictures travel.
    """

    endpoint: str
    arguments: dict[str, Any]
    pictures: tuple[Image.Image | str, ...]
    loras: tuple[tuple[Path | str, float], ...]
    size: tuple[int, int] | None
    cost_usd: float
    fingerprint: str

    def body(self, image_urls: Sequence[str], lora_paths: Sequence[str]) -> dict[str, Any]:
        """The JSON to send, with an address for each picture and LoRA.

        Raises:
            NotAccepted: a value that the endpoint does not take.
        """
        return _body(self.arguments, image_urls, [*zip(lora_paths, (scale for _, scale in self.loras), strict=True)])


def make_order(
    arguments: dict[str, Any],
    pictures: Sequence[Image.Image | str] = (),
    loras: Sequence[tuple[Path | str, float]] = (),
) -> Order:
    """An `Order` from the endpoint's fields (``image_size`` a preset, ``auto`` or (width, height)).

    Raises:
        NotAccepted: too many pictures or LoRAs, LoRAs without a picture, a value out of range.
    """
    if len(pictures) > MAX_IMAGES:
        raise NotAccepted(
            f"{len(pictures)} pictures are given (connected ones and image_urls together); the endpoint takes at most "
            f"{MAX_IMAGES}. Leave some out."
        )
    if len(loras) > MAX_LORAS:
        raise NotAccepted(
            f"{len(loras)} LoRAs are given (lora_stack and lora_urls together); the endpoint takes at most "
            f"{MAX_LORAS}. Leave some out."
        )
    if loras and not pictures:
        raise NotAccepted(
            f"LoRAs are given but no picture: {TEXT_ENDPOINT} makes pictures from a prompt without LoRAs, and "
            f"{EDIT_ENDPOINT} takes LoRAs with one to {MAX_IMAGES} pictures. Connect a picture, or take the LoRAs away."
        )
    size = arguments["image_size"]
    given = {**arguments, "image_size": _sent_size(size)}
    names = [picture if isinstance(picture, str) else pixel_digest(picture) for picture in pictures]
    weights = [(path if isinstance(path, str) else file_digest(path), scale) for path, scale in loras]
    checked = _body(given, names, weights)
    try:
        json.dumps(checked, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise NotAccepted(
            "prompt or negative_prompt holds half of a character (a lone surrogate); type it anew."
        ) from None
    sources = [None if isinstance(picture, str) else picture.size for picture in pictures]
    pixels = checked["num_images"] * most_pixels(size, sources) + len(pictures) * MEGAPIXEL
    cost = USD_PER_MEGAPIXEL * pixels / MEGAPIXEL
    endpoint = EDIT_ENDPOINT if pictures else TEXT_ENDPOINT
    same = {**checked, "sync_mode": False, "image_size": _size_name(size, endpoint)}
    same = {name: value for name, value in same.items() if value is not None}
    fingerprint = hashlib.sha256(json.dumps([endpoint, same], sort_keys=True).encode()).hexdigest()
    chosen = IMAGE_SIZES.get(size) if isinstance(size, str) else size
    plain = {name: value for name, value in checked.items() if name not in ("image_urls", "loras")}
    return Order(endpoint, plain, tuple(pictures), tuple(loras), chosen, cost, fingerprint)


def most_pixels(image_size: str | tuple[int, int], sources: Sequence[tuple[int, int] | None]) -> int:
    """Pixels of one result, at most.

    Args:
        image_size: a preset, ``auto``, or (width, height).
        sources: (width, height) of each input, None for one that is only an address.
    """
    if image_size == AUTO and sources:  # the input's size, perhaps as resized to a megapixel: not documented
        width, height = sources[0] or (MAX_SIDE, MAX_SIDE)
        return max(MEGAPIXEL, min(width, MAX_SIDE) * min(height, MAX_SIDE))
    preset = DEFAULT_SIZE if image_size == AUTO else image_size
    width, height = IMAGE_SIZES[preset] if isinstance(preset, str) else preset
    return width * height


def check_cost(cost: float, limit: float) -> None:
    """Raise `NotAccepted` where the cost is above the limit."""
    if not cost <= limit + 1e-9:  # so that NaN is no limit that everything passes
        raise NotAccepted(
            f"this request costs ${cost:.4f}, more than max_cost_usd {limit:g}; nothing was submitted. Raise "
            "max_cost_usd, or ask for fewer or smaller pictures."
        )


def parse_image_urls(text: str) -> list[str]:
    """Addresses of pictures, one a line.

    Raises:
        NotAccepted: a line that is none.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        if not _ADDRESS.fullmatch(line):
            text = f"image_urls: {line[:80]!r} is no address; give https://... or data:image/..., one a line."
            raise NotAccepted(text)
    return lines


def parse_lora_urls(text: str) -> list[tuple[str, float]]:
    """(address or repository, scale) from lines ``URL-or-repo scale``; without a scale it is 1.

    Raises:
        NotAccepted: a line that is not like that.
    """
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        path, *rest = line.split()
        if len(rest) > 1 or not (_ADDRESS.fullmatch(path) or _REPOSITORY.fullmatch(path)):
            raise NotAccepted(
                f"lora_urls: {line[:120]!r} is not 'URL-or-repo scale'. Files of this machine go through lora_stack."
            )
        try:
            found.append((path, float(rest[0]) if rest else 1.0))
        except ValueError:
            raise NotAccepted(f"lora_urls: {rest[0]!r} after {path} is no number.") from None
    return found


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content.

    Raises:
        NotAccepted: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    except OSError as error:
        raise NotAccepted(f"LoRA {path.name} cannot be read ({type(error).__name__}).") from None
    return digest.hexdigest()


def _body(arguments: dict[str, Any], image_urls: Sequence[str], loras: Sequence[tuple[str, float]]) -> dict[str, Any]:
    weights = [{"path": path, "scale": scale} for path, scale in loras]
    try:
        if image_urls:
            return body(EditRequest(**arguments, image_urls=list(image_urls), loras=weights))
        return body(TextRequest(**arguments))
    except pydantic.ValidationError as error:
        raise NotAccepted(refusal(error)) from None


def _sent_size(size: str | tuple[int, int]) -> Any:
    """``auto`` is the endpoint's own default, so nothing is sent in its place."""
    if size == AUTO:
        return None
    return {"width": size[0], "height": size[1]} if isinstance(size, tuple) else size


def _size_name(size: str | tuple[int, int], endpoint: str) -> Any:
    """One name for one size, as it is sent: a preset's where there is one, None for the endpoint's own default."""
    name = next((name for name, pixels in IMAGE_SIZES.items() if pixels == size), size)
    return _sent_size(AUTO if endpoint == TEXT_ENDPOINT and name == DEFAULT_SIZE else name)
