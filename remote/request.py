"""A request as the endpoints take it, typed. Ranges come from `FalFields` and `CNSParams`, never from here."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, create_model

from ..sampler.params import LOCAL_NAMES, SWITCH, CNSParams, public_name
from .fields import IMAGE_SIZES, MAX_IMAGES, MAX_LORAS, MAX_SIDE, MIN_SIDE, FalFields

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


def _typed(spec: Field[Any]) -> tuple[Any, Any]:
    """(annotation, default) of a `number`, `choice`, `flag` or text field."""
    meta = spec.metadata
    default = ... if spec.default is MISSING else spec.default
    if "options" in meta:
        options = tuple(option for option in meta["options"] if option not in meta.get("local", ()))
        return Literal[options], default
    if "min" in meta:
        limits = pydantic.Field(ge=meta["min"], le=meta["max"], allow_inf_nan=False, strict=True)
        if isinstance(meta["step"], int):
            limits = pydantic.Field(ge=meta["min"], le=meta["max"], strict=True)
        kind = int if isinstance(meta["step"], int) else float
        return Annotated[kind, limits], default
    kind = bool if isinstance(default, bool) else str
    return Annotated[kind, pydantic.Field(strict=True)], default


_shared = {spec.name: _typed(spec) for spec in fields(FalFields)}
_shared["seed"] = (_shared["seed"][0] | None, None)  # the endpoint draws one where it is left out
_cns = {public_name(spec.name): _typed(spec) for spec in fields(CNSParams)}
_cns[SWITCH] = (_cns[SWITCH][0], False)

TextRequest = create_model(
    "TextRequest",
    __config__=_CONFIG,
    **_shared,
    image_size=(Literal[tuple(IMAGE_SIZES)] | ImageSize | None, None),
    **{name: typed for name, typed in _cns.items() if name not in LOCAL_NAMES},
)
TextRequest.__doc__ = "What ``klein/9b/base`` takes. ``image_size`` None is left out: landscape_4_3."

EditRequest = create_model(
    "EditRequest",
    __base__=TextRequest,
    image_urls=(Annotated[list[str], pydantic.Field(min_length=1, max_length=MAX_IMAGES)], ...),
    loras=(Annotated[list[LoraInput], pydantic.Field(max_length=MAX_LORAS)], []),
)
EditRequest.__doc__ = "What ``klein/9b/base/edit/lora`` takes. ``image_size`` None is left out: the input's size."


def body(request: BaseModel) -> dict[str, Any]:
    """The JSON object to send: what is None is left out."""
    return request.model_dump(exclude_none=True)


def refusal(error: pydantic.ValidationError) -> str:
    """A sentence for each thing that does not fit, with its field."""
    found = []
    for fault in error.errors():
        name, value = ".".join(map(str, fault["loc"])), repr(fault["input"])
        found.append(f"{name} is {value if len(value) <= 80 else value[:80] + '...'}: {fault['msg']}")
    return "; ".join(found) + "."
