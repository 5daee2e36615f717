"""The order of a run, checked, priced and hashed before anything is sent.

A request is a pydantic model that is made from `fields.specs`; only that place states ranges and options.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from PIL import Image
from pydantic import BaseModel, ConfigDict, create_model

from ..endpoint import AUTO, DEFAULT_SIZE, IMAGE_SIZES, MAX_IMAGES, MAX_LORAS, MAX_SIDE
from .errors import NotAccepted
from .fields import EDIT_ENDPOINT, MIN_SIDE, TEXT_ENDPOINT, Spec, specs

_ADDRESS = re.compile(r"https?://\S+|data:image/\S+")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
USD_PER_MEGAPIXEL = 0.02  # of input and output; fal resizes every input to one megapixel and charges that
MEGAPIXEL = 1024 * 1024
Size = str | tuple[int, int]  # a preset, ``auto``, or (width, height)
Lora = tuple[Path | str, float]  # a file, or an address or repository that fal fetches; and its scale

_CONFIG = ConfigDict(extra="forbid", frozen=True)
_Side = Annotated[int, pydantic.Field(ge=MIN_SIDE, le=MAX_SIDE, strict=True)]


class ImageSize(BaseModel):
    """Pixels of the result."""

    model_config = _CONFIG

    width: _Side
    height: _Side


class LoraInput(BaseModel):
    """One LoRA: an address or a Hugging Face repository, and its scale."""

    model_config = _CONFIG

    path: Annotated[str, pydantic.Field(min_length=1)]
    scale: Annotated[float, pydantic.Field(allow_inf_nan=False, strict=True)] = 1.0


def _typed(spec: Spec) -> Any:
    """(annotation, default) of a field in a request."""
    meta, default = spec.metadata, ... if spec.default is None else spec.default
    if "options" in meta:
        return Literal[meta["options"]], default
    if "min" not in meta:
        return (bool if isinstance(default, bool) else str), pydantic.Field(default, strict=True)
    limits: dict[str, Any] = {"ge": meta["min"], "le": meta["max"], "strict": True}
    if isinstance(meta["step"], int):
        return Annotated[int, pydantic.Field(**limits)], default
    return Annotated[float, pydantic.Field(**limits, allow_inf_nan=False)], default


_fields: dict[str, Any] = {name: _typed(spec) for name, spec in specs().items()}
_fields["seed"] = (_fields["seed"][0] | None, None)  # the endpoint draws one where it is left out
_fields["image_size"] = (Literal[tuple(IMAGE_SIZES)] | ImageSize | None, None)
_more: dict[str, Any] = {
    "image_urls": (Annotated[list[str], pydantic.Field(min_length=1, max_length=MAX_IMAGES)], ...),
    "loras": (Annotated[list[LoraInput], pydantic.Field(max_length=MAX_LORAS)], []),
}
TextRequest = create_model("TextRequest", __config__=_CONFIG, **_fields)
TextRequest.__doc__ = "What ``klein/9b/base`` takes. ``image_size`` None is left out: landscape_4_3."
EditRequest = create_model("EditRequest", __base__=TextRequest, **_more)
EditRequest.__doc__ = "What ``klein/9b/base/edit/lora`` takes. ``image_size`` None is left out: the input's size."


@dataclass(frozen=True)
class Order:
    """One remote run.

    Args:
        endpoint: names it as fal does.
        arguments: hold the request without pictures and LoRAs.
        pictures: each is a picture, or an address that fal fetches.
        loras: each is (file, or address or repository that fal fetches; scale).
        size: gives (width, height) of the result where it was chosen; None for ``auto``.
        cost_usd: counts what fal will charge, at most.
        fingerprint: hashes everything that decides the result; it is the same for the same pixels and file contents,
            however a size is named and however the pictures travel.
    """

    endpoint: str
    arguments: dict[str, Any]
    pictures: tuple[Image.Image | str, ...]
    loras: tuple[Lora, ...]
    size: tuple[int, int] | None
    cost_usd: float
    fingerprint: str

    def body(self, image_urls: Sequence[str], lora_paths: Sequence[str]) -> dict[str, Any]:
        """The JSON to send, with an address for each picture and LoRA.

        Raises:
            NotAccepted: the endpoint does not take a value.
        """
        scales = (scale for _, scale in self.loras)
        return _checked(self.arguments, image_urls, list(zip(lora_paths, scales, strict=True)))


def make_order(
    arguments: dict[str, Any], pictures: Sequence[Image.Image | str] = (), loras: Sequence[Lora] = ()
) -> Order:
    """Check and price a run, and hash what decides its result.

    >>> make_order({"prompt": "a red coat", "image_size": "auto"}, [Image.new("RGB", (1024, 1024))]).cost_usd
    0.04

    Args:
        arguments: the endpoint's fields, ``image_size`` among them and ``enable_cns`` and ``cns_*`` too.
        pictures: at most four pictures, or addresses that fal fetches.
        loras: at most three (file, or address or repository; scale).

    Raises:
        NotAccepted: there are too many pictures or LoRAs, LoRAs without a picture, or a value is out of range.
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
            f"{EDIT_ENDPOINT} takes LoRAs with one to four pictures. Connect a picture, or take the LoRAs away."
        )
    size: Size = arguments["image_size"]
    names = [picture if isinstance(picture, str) else pixel_digest(picture) for picture in pictures]
    weights = [(path if isinstance(path, str) else file_digest(path), scale) for path, scale in loras]
    checked = _checked({**arguments, "image_size": _sent(size)}, names, weights)
    _check_text(checked)
    endpoint = EDIT_ENDPOINT if pictures else TEXT_ENDPOINT
    sources = [None if isinstance(picture, str) else picture.size for picture in pictures]
    return Order(
        endpoint=endpoint,
        arguments={name: value for name, value in checked.items() if name not in _more},
        pictures=tuple(pictures),
        loras=tuple(loras),
        size=IMAGE_SIZES.get(size) if isinstance(size, str) else size,
        cost_usd=price_usd(size, sources, checked["num_images"]),
        fingerprint=_fingerprint(endpoint, checked, size),
    )


def price_usd(image_size: Size, sources: Sequence[tuple[int, int] | None], num_images: int) -> float:
    """USD that fal will charge, at most.

    >>> price_usd("square_hd", [(640, 480)], 1)
    0.04

    Args:
        image_size, sources: as `most_pixels`.
        num_images: counts the results.
    """
    pixels = num_images * most_pixels(image_size, sources) + len(sources) * MEGAPIXEL
    return USD_PER_MEGAPIXEL * pixels / MEGAPIXEL


def most_pixels(image_size: Size, sources: Sequence[tuple[int, int] | None]) -> int:
    """Pixels of one result, at most.

    >>> most_pixels("square", [])
    262144

    Args:
        image_size: names a preset or ``auto``, or gives (width, height).
        sources: give (width, height) of each input; None for one that is only an address.
    """
    if image_size == AUTO and sources:  # the input's size, perhaps as resized to a megapixel: not documented
        width, height = sources[0] or (MAX_SIDE, MAX_SIDE)
        return max(MEGAPIXEL, min(width, MAX_SIDE) * min(height, MAX_SIDE))
    preset = DEFAULT_SIZE if image_size == AUTO else image_size
    width, height = IMAGE_SIZES[preset] if isinstance(preset, str) else preset
    return width * height


def parse_image_urls(text: str) -> list[str]:
    """Addresses of pictures, one a line.

    >>> parse_image_urls("https://example.com/a.png")
    ['https://example.com/a.png']

    Raises:
        NotAccepted: a line is not an address.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        if not _ADDRESS.fullmatch(line):
            raise NotAccepted(
                f"image_urls: {line[:80]!r} is not an address; give https://... or data:image/..., one a line."
            )
    return lines


def parse_lora_urls(text: str) -> list[Lora]:
    """(address or repository, scale) from lines ``URL-or-repo scale``; without a scale it is 1.

    >>> parse_lora_urls("owner/name 0.5")
    [('owner/name', 0.5)]

    Raises:
        NotAccepted: a line has another form.
    """
    found: list[Lora] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        path, *rest = line.split()
        if len(rest) > 1 or not (_ADDRESS.fullmatch(path) or _REPOSITORY.fullmatch(path)):
            raise NotAccepted(
                f"lora_urls: {line[:120]!r} is not 'URL-or-repo scale'. Files of this machine go through lora_stack."
            )
        try:
            found.append((path, float(rest[0]) if rest else 1.0))
        except ValueError:
            raise NotAccepted(
                f"lora_urls: {rest[0]!r} after {path} is not a number; give a scale, for example 0.8."
            ) from None
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


def pixel_digest(picture: Image.Image) -> str:
    """A hash of size and pixels, which no file format changes.

    >>> len(pixel_digest(Image.new("RGB", (2, 2))))
    64
    """
    return hashlib.sha256(repr(picture.size).encode() + picture.convert("RGB").tobytes()).hexdigest()


def body(request: BaseModel) -> dict[str, Any]:
    """The JSON object of a request: what is None is left out."""
    return request.model_dump(exclude_none=True)


def _checked(
    arguments: dict[str, Any], image_urls: Sequence[str], loras: Sequence[tuple[str, float]]
) -> dict[str, Any]:
    weights = [{"path": path, "scale": scale} for path, scale in loras]
    try:
        if image_urls:
            return body(EditRequest(**arguments, image_urls=list(image_urls), loras=weights))
        return body(TextRequest(**arguments))
    except pydantic.ValidationError as error:
        raise NotAccepted(_refusal(error)) from None


def _refusal(error: pydantic.ValidationError) -> str:
    """A sentence for each thing that does not fit, with its field."""
    found = []
    for fault in error.errors():
        name, value = ".".join(map(str, fault["loc"])), repr(fault["input"])
        found.append(f"{name} is {value if len(value) <= 80 else value[:80] + '...'}: {fault['msg']}")
    return "; ".join(found) + "."


def _check_text(checked: dict[str, Any]) -> None:
    try:
        json.dumps(checked, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise NotAccepted(
            "prompt or negative_prompt holds half of a character (a lone surrogate); type it again."
        ) from None


def _sent(size: Size) -> Any:
    """``auto`` is the endpoint's own default, so nothing is sent in its place."""
    if size == AUTO:
        return None
    return {"width": size[0], "height": size[1]} if isinstance(size, tuple) else size


def _fingerprint(endpoint: str, checked: dict[str, Any], size: Size) -> str:
    """The hash of a request with one name for one size, and without the way in which the pictures come back."""
    named: Size = next((name for name, pixels in IMAGE_SIZES.items() if pixels == size), size)
    sent = _sent(AUTO if endpoint == TEXT_ENDPOINT and named == DEFAULT_SIZE else named)
    same = {**checked, "sync_mode": False, "image_size": sent}
    same = {name: value for name, value in same.items() if value is not None}
    return hashlib.sha256(json.dumps([endpoint, same], sort_keys=True).encode()).hexdigest()
