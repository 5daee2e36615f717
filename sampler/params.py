"""The CNS parameters: the one place that knows their names, defaults, ranges and meaning.

Outside this package every name carries the prefix ``cns_`` (node widgets, command-line options, the
fal request, the scheduler's config); inside none does. Names, defaults and ranges are those of the
endpoint ``fal-ai/flux-2/klein/9b/base/edit/lora``; ``formula`` and the γ source ``reference``
exist only locally.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

PREFIX = "cns_"
MAX_SEED = 2**64 - 1  # as ComfyUI has it
SWITCH = "enable_cns"
GAMMA_FILE = "cns_gamma_file"  # which matrix: no parameter of its own, since a matrix is data
SWITCH_HELP = "Turn Colored Noise Sampling on. Off, every cns_ value is ignored and no noise is added."
LEVELS = ("none", "regular", "high")  # of acceleration, as the endpoint names and orders them
GUIDED_DIVIDER, GUIDED_ENERGY = 25.0, 0.998  # what the endpoint advises for a base model with real guidance
GUIDED_ADVICE = (
    f"For a base model with real guidance the endpoint advises divider {GUIDED_DIVIDER:g} and energy {GUIDED_ENERGY:g}."
)


def number(default: Any, low: float, high: float, step: float, meaning: str) -> Any:
    """A dataclass field with a range.

    Args:
        default: fills the field where no value is given.
        low, high: bound the value, both included.
        step: the widget's step; an int makes the field a whole number.
        meaning: tells a user in one sentence what the field does.
    """
    return field(default=default, metadata={"min": low, "max": high, "step": step, "help": meaning})


def flag(default: bool, meaning: str) -> Any:
    """A dataclass field that is true or false."""
    return field(default=default, metadata={"help": meaning})


def choice(options: tuple[str, ...], meaning: str, local: tuple[str, ...] = ()) -> Any:
    """A dataclass field with named options.

    Args:
        options: names what is allowed; the first is the default.
        meaning: tells a user in one sentence what the field does.
        local: names the options that the endpoint lacks.
    """
    return field(default=options[0], metadata={"options": options, "local": local, "help": meaning})


@dataclass(frozen=True)
class CNSParams:
    """Every control of Colored Noise Sampling (arXiv:2605.30332), checked on construction.

    >>> CNSParams(s_churn=1).s_churn
    1.0

    Raises:
        ValueError: a value has the wrong type, is out of range or is not finite; the message names the
            parameter, the value and what is allowed.
    """

    enable_cns: bool = flag(True, SWITCH_HELP)
    s_churn: float = number(
        0.5,
        0.0,
        2.0,
        0.01,
        "Strength of the coloured noise added back after every step. At 0 none is, and nothing below matters: "
        "set this before the rest.",
    )
    gamma_source: str = choice(
        ("matrix", "approximation", "reference"),
        "What tells how far each band is resolved (gamma): 'matrix' a measured table, 'approximation' the flow time "
        "itself, equal for all bands, 'reference' (local only) the spectrum of the pictures being edited.",
        local=("reference",),
    )
    power_gamma: float = number(
        0.75,
        0.1,
        3.0,
        0.01,
        "Contrast between open and resolved bands: the power of 1 - gamma / divider. Large values leave resolved "
        "bands nearly without noise. Does nothing under 'approximation' with the endpoint's formula.",
    )
    gamma_divider: float = number(
        1.73,
        0.1,
        50.0,
        0.01,
        "Divides gamma before the residual is taken: a larger value tends to white noise. " + GUIDED_ADVICE,
    )
    alpha_tilt_start: float = number(
        0.15,
        -2.0,
        2.0,
        0.01,
        "Tilt of the spectrum at the first step: positive favours high frequencies (texture), negative low "
        "ones (structure).",
    )
    alpha_tilt_end: float = number(
        -0.5,
        -2.0,
        2.0,
        0.01,
        "Tilt of the spectrum at the last step, reached from alpha_tilt_start over the steps.",
    )
    alpha_use_fnorm: bool = flag(
        True,
        "Tilt by exp(alpha * f), f the band's position. Off, the tilt is the flat factor 1 + alpha, which the "
        "variance normalisation cancels.",
    )
    alpha_exp_interp: bool = flag(
        True, "Let the tilt move along an exponential curve from start to end, instead of a straight line."
    )
    alpha_exp_sharpness: float = number(
        0.75,
        0.1,
        10.0,
        0.01,
        "Bend of that curve: near 0 almost a line, high values move late. Without alpha_exp_interp unused.",
    )
    num_freq_bins: int = number(32, 8, 128, 1, "Number of rings in frequency that get a noise power of their own.")
    energy_scale: float = number(
        0.98,
        0.5,
        1.5,
        0.001,
        "Factor on the injected noise after its variance is normalised: below 1 damps it. " + GUIDED_ADVICE,
    )
    formula: str = choice(
        ("endpoint", "authors"),
        "How residual and tilt combine: 'endpoint' raises the residual to the power and takes the product as "
        "noise power, 'authors' raises their product to the power and takes it as amplitude, as in the paper's code.",
        local=("authors",),
    )

    def __post_init__(self) -> None:
        for spec in fields(self):
            object.__setattr__(self, spec.name, checked(spec, public_name(spec.name), getattr(self, spec.name)))

    @property
    def active_churn(self) -> float:
        """``s_churn``, or 0 where CNS is off: no noise is injected then."""
        return self.s_churn if self.enable_cns else 0.0

    @property
    def takes_matrix(self) -> bool:
        """Whether γ is a matrix, the one that ``cns_gamma_file`` chooses."""
        return self.enable_cns and self.gamma_source == "matrix"

    @classmethod
    def from_endpoint(cls, request: Mapping[str, Any]) -> CNSParams:
        """Read ``enable_cns`` (off where it is left out) and the ``cns_*`` of a whole request.

        The local name ``cns_formula`` is read too; the request's other fields are ignored.

        >>> CNSParams.from_endpoint({"enable_cns": True, "cns_s_churn": 0.8}).s_churn
        0.8

        Raises:
            ValueError: a ``cns_*`` does not exist, or it has a bad value.
        """
        names = {public_name(spec.name): spec.name for spec in fields(cls)}
        given = {key: value for key, value in request.items() if key in names or str(key).startswith(PREFIX)}
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ValueError(
                f"unknown CNS parameter {', '.join(unknown)}; known are {', '.join(sorted(names))}. "
                "Correct the name or leave it out."
            )
        return cls(**{SWITCH: False, **{names[key]: value for key, value in given.items()}})

    def to_request(self) -> dict[str, Any]:
        """Every parameter under its public name, the local ones too. ``from_endpoint`` reads it back.

        >>> CNSParams().to_request()["cns_s_churn"]
        0.5
        """
        return {public_name(spec.name): getattr(self, spec.name) for spec in fields(self)}

    def to_endpoint(self) -> dict[str, Any]:
        """The part of a fal request that says the same.

        >>> "cns_formula" in CNSParams().to_endpoint()
        False

        Raises:
            ValueError: the endpoint does not have a value (a local formula or γ source).
        """
        for spec in fields(self):
            value, local = getattr(self, spec.name), spec.metadata.get("local", ())
            if value in local:
                allowed = [option for option in spec.metadata["options"] if option not in local]
                raise ValueError(
                    f"{public_name(spec.name)}={value!r} runs only locally; the endpoint has {allowed}. "
                    "Choose one of these for a remote run."
                )
        return {name: value for name, value in self.to_request().items() if name not in LOCAL_NAMES}


def public_name(name: str) -> str:
    """The name a parameter carries outside this package.

    >>> public_name("s_churn")
    'cns_s_churn'
    """
    return name if name == SWITCH else PREFIX + name


LOCAL_NAMES = frozenset({public_name("formula")})


def checked_number(name: str, value: Any, low: float, high: float, whole: bool = False) -> Any:
    """``value`` as int or float.

    >>> checked_number("steps", 28, 1, 200, whole=True)
    28

    Args:
        name: names the value in an error.
        value: any number; a boolean is refused.
        low, high: bound it, both included.
        whole: allows whole numbers alone.

    Raises:
        ValueError: the value has another type, is not finite or is out of range; the message names what is allowed.
    """
    allowed = f"allowed is {'a whole number' if whole else 'a number'} from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
        raise ValueError(f"{name} is {value!r} ({type(value).__name__}); {allowed}.")
    plain: Any = value
    try:
        found = int(plain) if whole else float(plain)
    except OverflowError:
        found = math.inf
    if not (math.isfinite(found) and low <= found <= high):
        raise ValueError(f"{name} is {found}; {allowed}.")
    return found


def checked(spec: Any, name: str, value: Any) -> Any:
    """``value`` in the type of its field.

    Args:
        spec: a dataclass field made by `number`, `choice` or `flag`.
        name: names the value in an error.

    Raises:
        ValueError: the value does not fit the field; the message says what is allowed.
    """
    meta = spec.metadata
    if "options" in meta:
        if not isinstance(value, str) or value not in meta["options"]:
            raise ValueError(f"{name} is {value!r}; allowed are {', '.join(meta['options'])}.")
        return value
    if "min" in meta:
        return checked_number(name, value, meta["min"], meta["max"], whole=isinstance(meta["step"], int))
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r} ({type(value).__name__}); allowed are true and false.")
    return value
