"""A response as the endpoints give it, typed, and lenient: a paid picture is not lost for a missing field."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, StrictBool, ValidationError

from .errors import RemoteError, Unobtainable
from .pictures import inline_bytes

SAVED_AS = "saved as "  # stands in the kept response where a picture was inside it
Model = TypeVar("Model", bound=BaseModel)


class NoPictures(Unobtainable):
    """An answer that holds no picture, so it is no result."""


class ImageFile(BaseModel):
    """One picture: a file at ``url`` (perhaps a data URI), or inline ``content``."""

    model_config = ConfigDict(extra="allow")

    url: str | None = None
    content: str | None = None
    content_type: str | None = None
    file_name: str | None = None
    file_size: int | None = None
    width: int | None = None
    height: int | None = None

    @property
    def inline(self) -> str | None:
        """The text that holds the picture itself; None where it has an address."""
        if self.content and not self.content.startswith(SAVED_AS):
            return self.content
        return self.url if self.url and self.url.startswith("data:") else None


class Response(BaseModel):
    """What came back. Unknown fields are kept. ``images`` holds None where an entry is no picture."""

    model_config = ConfigDict(extra="allow")

    images: list[ImageFile | None]
    timings: dict[str, Any] | None = None
    seed: int | None = None
    has_nsfw_concepts: list[bool | None] | StrictBool | None = None
    prompt: str | None = None


def parse_response(data: Any) -> tuple[Response, list[str]]:
    """The response, and a warning for each picture and field that is missing or unusable (and was left aside).

    Raises:
        NoPictures: it is no result.
    """
    entries = data.get("images") if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise NoPictures("fal's response holds no list of pictures.")
    images: list[ImageFile | None] = []
    faults, warnings = [], []
    for number, entry in enumerate(entries, start=1):
        try:
            image, spoiled = _image(entry)
            warnings += spoiled
        except RemoteError as error:
            image = None
            faults.append(f"picture {number} of fal's response {error}")
        images.append(image)
    if not any(images):
        raise NoPictures(f"fal's response holds no picture{''.join(f'; {fault}' for fault in faults)}.")
    response, spoiled = _lenient(Response, {**data, "images": images})
    warnings += spoiled
    missing = [name for name in ("timings", "seed", "has_nsfw_concepts", "prompt") if getattr(response, name) is None]
    dropped = {warning.split()[0] for warning in spoiled}
    missing = [f"{name} is missing in fal's response" for name in missing if name not in dropped]
    return response, [*faults, *warnings, *missing]


def _image(entry: Any) -> tuple[ImageFile, list[str]]:
    """Raises RemoteError with what is wrong with an entry that is no picture."""
    if not isinstance(entry, dict):
        raise RemoteError(f"is {'null' if entry is None else type(entry).__name__}")
    image, warnings = _lenient(ImageFile, entry)
    if image.inline is not None:
        inline_bytes(image.inline)
    elif not (image.url or image.content):
        raise RemoteError("names no address")
    return image, warnings


def _lenient(model: type[Model], data: dict[str, Any]) -> tuple[Model, list[str]]:
    """The model of the fields that fit, and a warning for each that does not."""
    try:
        return model.model_validate(data), []
    except ValidationError as error:
        spoiled = sorted({str(fault["loc"][0]) for fault in error.errors()})
        kept = {name: value for name, value in data.items() if name not in spoiled}
        return model.model_validate(kept), [f"{name} in fal's response is unusable" for name in spoiled]
