"""What one picture is made from: the endpoint's fields, checked, with what exists only locally."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..sampler.acceleration import ACCELERATION_HELP
from ..sampler.params import LEVELS, MAX_SEED, CNSParams, checked, choice, number
from ..sampler.solvers import SOLVER_HELP, SOLVERS
from .schedules import SCHEDULES
from .sizes import AUTO, parse_image_size
from .words import is_unicode


@dataclass(frozen=True)
class KleinRequest:
    """One run of `KleinPipeline`, without pictures and LoRAs. Names are the endpoint's.

    >>> KleinRequest("a red coat", seed=7, image_size="512x512").image_size
    (512, 512)

    Raises:
        ValueError: a value of the wrong type or out of range; the message names it and what is allowed.
    """

    prompt: str = field(metadata={"help": "What to make or change."})
    negative_prompt: str = field(default="", metadata={"help": "What to avoid."})
    guidance_scale: float = number(5.0, 0.0, 20.0, 0.1, "Classifier-free guidance; 1 is none and takes half the time.")
    num_inference_steps: int = number(28, 1, 200, 1, "Denoising steps; the endpoint allows 4 to 50.")
    seed: int = number(
        None,
        0,
        MAX_SEED,
        1,
        "Where the noise starts; left out, a random one, which is reported. "
        "Seeds that differ by a multiple of 2^32 draw the same noise.",
    )
    image_size: str | tuple[int, int] = field(
        default=AUTO,
        metadata={"help": "A preset, WIDTHxHEIGHT, or auto: the first picture's own size, landscape_4_3 without one."},
    )
    num_images: int = number(1, 1, 4, 1, "How many pictures to make.")
    solver: str = choice(tuple(SOLVERS), f"{SOLVER_HELP} Local only.")
    scheduler: str = choice(
        tuple(SCHEDULES), "Sigma schedule (local only): klein's own, or log_snr, for few steps of solver sde_3m."
    )
    reference_megapixels: float = number(
        1.0, 0.1, 4.0, 0.1, "References above this size (1 = 1024 x 1024) are shrunk to it (local only)."
    )
    acceleration: str = choice(LEVELS, f"{ACCELERATION_HELP} fal's own default is regular.")
    cns: CNSParams = field(default_factory=lambda: CNSParams(enable_cns=False))

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if spec.metadata.keys() & {"min", "options"} and not (spec.name == "seed" and value is None):
                object.__setattr__(self, spec.name, checked(spec, spec.name, value))
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if not isinstance(text, str):
                raise ValueError(f"{name} is {text!r}; it must be text.")
            if not is_unicode(text):
                raise ValueError(f"{name} holds half of a character, or bytes that are not UTF-8; type it again.")
        if not isinstance(self.cns, CNSParams):
            raise ValueError(f"cns is {self.cns!r}; give CNSParams(...), or CNSParams.from_endpoint(request).")
        object.__setattr__(self, "image_size", parse_image_size(self.image_size))
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbelow(2**32))

    @classmethod
    def from_dict(cls, request: Mapping[str, Any]) -> KleinRequest:
        """Read the fields and the ``cns_*`` of one mapping, as `to_dict` writes them.

        Raises:
            ValueError: a bad value, or a ``cns_*`` that does not exist.
            TypeError: another field that does not exist.
        """
        cns = CNSParams.from_endpoint(request)
        own = {name: value for name, value in request.items() if name not in cns.to_request()}
        return cls(cns=cns, **own)

    def to_dict(self) -> dict[str, Any]:
        """Every field under its public name, as ``klein-cns --params`` reads it.

        >>> KleinRequest("a red coat", seed=7).to_dict()["seed"]
        7
        """
        request = {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.name != "cns"}
        if isinstance(self.image_size, tuple):
            request["image_size"] = {"width": self.image_size[0], "height": self.image_size[1]}
        return {**request, **self.cns.to_request()}
