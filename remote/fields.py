"""What the two fal endpoints take: names, defaults, ranges and meaning.

The node's widgets, the request model and the order are made from `specs`: a new field is one line in `FalFields`.
Imports no library, so that the widgets can be made before pydantic or fal-client are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, NamedTuple

from ..sampler.params import LEVELS, LOCAL_NAMES, MAX_SEED, SWITCH, CNSParams, flag, number, public_name

TEXT_ENDPOINT = "fal-ai/flux-2/klein/9b/base"
EDIT_ENDPOINT = "fal-ai/flux-2/klein/9b/base/edit/lora"
MIN_SIDE = 512  # pixels, of a custom size
CUSTOM = "custom"
ENDPOINT_SOLVER = "euler"


def _options(default: str, options: tuple[str, ...], meaning: str) -> Any:
    return field(default=default, metadata={"options": options, "help": meaning})


@dataclass(frozen=True)
class FalFields:
    """The fields that both endpoints share, but for size, pictures, LoRAs and CNS. Append new ones at the end."""

    prompt: str = field(metadata={"help": "What to make or change."})
    negative_prompt: str = field(default="", metadata={"help": "What to avoid."})
    guidance_scale: float = number(5.0, 0.0, 20.0, 0.1, "Classifier-free guidance.")
    seed: int = number(0, 0, MAX_SEED, 1, "Where the noise starts. The same inputs and seed cost nothing again.")
    num_inference_steps: int = number(28, 4, 50, 1, "Denoising steps.")
    num_images: int = number(1, 1, 4, 1, "How many pictures to make; each is charged.")
    acceleration: str = _options("regular", LEVELS, "How much exactness fal may trade for speed.")
    sync_mode: bool = flag(
        False,
        "The pictures come inside the answer and fal stores none: if that answer is lost on the way, what was paid for "
        "cannot be fetched again.",
    )
    enable_safety_checker: bool = flag(True, "fal checks the pictures; what it flags comes back black, and is charged.")
    output_format: str = _options("png", ("jpeg", "png", "webp"), "The format of the files that fal makes.")


class Spec(NamedTuple):
    """A field of the endpoints.

    Args:
        name: is the endpoint's.
        default: fills the field where no value is given; None where there is no default.
        metadata: holds ``help``; where the field has them, ``options``, or ``min``, ``max`` and ``step`` (an int for
            whole numbers).
    """

    name: str
    default: Any
    metadata: Mapping[str, Any]


def specs() -> dict[str, Spec]:
    """Every field of `FalFields`, then ``enable_cns`` and the ``cns_*`` with the options that the endpoints have.

    >>> specs()["cns_gamma_source"].metadata["options"]
    ('matrix', 'approximation')
    """
    own = [Spec(one.name, None if one.default is MISSING else one.default, one.metadata) for one in fields(FalFields)]
    return {spec.name: spec for spec in (*own, *_cns_specs())}


def _cns_specs() -> list[Spec]:
    found = []
    for one in fields(CNSParams):
        name, meta = public_name(one.name), dict(one.metadata)
        if name in LOCAL_NAMES:
            continue
        if "options" in meta:
            meta["options"] = tuple(option for option in meta["options"] if option not in meta.get("local", ()))
        found.append(Spec(name, False if name == SWITCH else one.default, meta))
    return found
