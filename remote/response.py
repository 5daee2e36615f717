"""A response as the endpoints give it, typed, and lenient: a paid picture is not lost for a missing field."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, StrictBool, ValidationError

from .errors import Unobtainable


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


class Response(BaseModel):
    """What came back. Unknown fields are kept."""

    model_config = ConfigDict(extra="allow")

    images: list[ImageFile]
    timings: dict[str, Any] | None = None
    seed: int | None = None
    has_nsfw_concepts: list[bool | None] | StrictBool | None = None
    prompt: str | None = None


def parse_response(data: dict[str, Any]) -> tuple[Response, list[str]]:
    """The response, and a warning for each field that is missing or of another type (and was left aside).

    Raises:
        Unobtainable: it holds no list of pictures.
    """
    warnings = []
    try:
        response = Response.model_validate(data)
    except ValidationError as error:
        spoiled = {fault["loc"][:3] if fault["loc"][0] == "images" else fault["loc"][:1] for fault in error.errors()}
        if any(len(where) < 3 if where[0] == "images" else False for where in spoiled):
            raise Unobtainable("fal's response holds no list of pictures.") from None
        data, warnings = _without(data, spoiled)
        response = Response.model_validate(data)
    if not response.images:
        raise Unobtainable("fal's response holds no picture.")
    missing = [name for name in ("timings", "seed", "has_nsfw_concepts", "prompt") if getattr(response, name) is None]
    dropped = {warning.split()[0] for warning in warnings}
    return response, warnings + [f"{name} is missing in fal's response" for name in missing if name not in dropped]


def _without(data: dict[str, Any], spoiled: set[tuple[Any, ...]]) -> tuple[dict[str, Any], list[str]]:
    """A copy of the response without these fields: (name,) or ("images", index, name)."""
    data = {**data, "images": [dict(image) for image in data["images"]]}
    warnings = []
    for where in sorted(spoiled, key=str):
        holder = data["images"][where[1]] if where[0] == "images" else data
        holder.pop(where[-1])
        warnings.append(f"{where[-1]} in fal's response is unusable")
    return data, warnings
