"""peft's config of an adapter: what of it decides the size of a change."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from .report import LoraError, printable

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG = 2_000_000  # bytes
MAX_PATTERN = 256  # characters
MAX_PATTERNS = 256  # klein has fewer modules
# Patterns are regular expressions from a stranger: no repeated group, few choices, so that none takes long.
UNSAFE_PATTERN = re.compile(r"\)[*+?{]|\(\?|\\\d|(?:[*+?{|].*){4}", re.DOTALL)
METADATA_KEY = "lora_adapter_metadata"  # where diffusers puts the config
UNSUPPORTED_OPTIONS = (  # of peft; each computes something else from the same factors
    "fan_in_fan_out", "use_qalora", "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config", "layer_replication",
)  # fmt: skip
PLAIN_INITS = ("gaussian", "orthogonal", "eva", "mica")  # which leave the base weight as it was
FIELDS = (
    "peft_type", "r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "init_lora_weights", *UNSUPPORTED_OPTIONS,
)  # fmt: skip
FLAGS = {"1": True, "yes": True, "true": True, "0": False, "no": False, "false": False}
KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "a table"}
Patterns = tuple[tuple[str, float], ...]


class AdapterConfig(NamedTuple):
    """What a config says of the size of a change.

    Attributes:
        peft_type: LORA, LOKR or LOHA; empty where there is no config.
        alpha: scales the change, divided by the rank; None where no alpha is given.
    """

    peft_type: str = ""
    rank: int | None = None
    alpha: float | None = None
    rank_pattern: Patterns = ()
    alpha_pattern: Patterns = ()
    rslora: bool = False
    dora: bool = False

    def alpha_of(self, module: str) -> float | None:
        """The alpha of a module by its full name; None where the config gives none."""
        return _matched(self.alpha_pattern, module, self.alpha)

    def rank_of(self, module: str) -> float | None:
        """The rank of a module by its full name, which its factors need not show."""
        return _matched(self.rank_pattern, module, self.rank)


def read_config(path: Path, label: str) -> AdapterConfig:
    """The config in an adapter_config.json.

    Raises:
        LoraError: it is not a JSON object, a value has a wrong type, or the adapter is not a LoRA, LoKr or LoHa.
    """
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise LoraError(f"LoRA {label}: {CONFIG_FILE} is larger than {MAX_CONFIG} bytes; it is none of peft's.")
        return _config(label, json.loads(path.read_text(encoding="utf-8")))
    except LoraError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise LoraError(f"LoRA {label}: {CONFIG_FILE} beside it cannot be read as JSON; download it again.") from error


def config_of_metadata(label: str, metadata: Mapping[str, str]) -> AdapterConfig:
    """The config in a file's metadata: as diffusers writes it, or under peft's own names.

    >>> config_of_metadata("a.safetensors", {"peft_type": "LORA", "r": "16"}).peft_type
    'LORA'

    Args:
        label: names the file in an error.
        metadata: holds the texts of a safetensors header.

    Raises:
        LoraError: as `read_config`.
    """
    try:
        if METADATA_KEY in metadata:
            stored = json.loads(metadata[METADATA_KEY])
            if not isinstance(stored, dict):
                raise LoraError(f"LoRA {label}: its metadata {METADATA_KEY} is not a table; download it again.")
            return _config(label, {key.removeprefix("transformer."): value for key, value in stored.items()})
        found = {name: _plain(name, metadata[name].strip()) for name in FIELDS if name in metadata}
    except LoraError:
        raise
    except (ValueError, RecursionError) as error:
        raise LoraError(f"LoRA {label}: its metadata {METADATA_KEY} is not JSON; download it again.") from error
    return _config(label, found) if found else AdapterConfig()


def _plain(name: str, text: str) -> Any:
    """A field that metadata holds as text, as trainers write it: ``True``, ``yes``, ``1``, ``16.0``, ``lora``."""
    if name == "peft_type":
        return text.upper() or None
    if name.startswith("use_") and text.lower() in FLAGS:
        return FLAGS[text.lower()]
    try:
        value = json.loads({"": "null", "True": "true", "False": "false", "None": "null"}.get(text, text))
    except (ValueError, RecursionError):
        return text
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _config(label: str, stored: Any) -> AdapterConfig:
    if not isinstance(stored, dict):
        raise LoraError(f"LoRA {label}: {CONFIG_FILE} holds no table; download it again.")

    def get(name: str, kinds: tuple[type, ...], default: Any) -> Any:
        value = stored.get(name)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise LoraError(
                f"LoRA {label}: {name} in its config is {str(value)[:100]!r}; it must be {KINDS[kinds[0]]}. "
                "Correct it, or download the LoRA again."
            )
        if isinstance(value, (int, float)) and not _is_usable(value):
            raise LoraError(f"LoRA {label}: {name} in its config is {str(value)[:100]}; it must be a finite number.")
        return value

    kind = get("peft_type", (str,), "LORA")
    if kind not in ("LORA", "LOKR", "LOHA"):
        raise LoraError(f"LoRA {label} is a {kind[:100]} of peft; LORA, LOKR and LOHA are supported.")
    for option in UNSUPPORTED_OPTIONS:
        if stored.get(option):
            raise LoraError(f"LoRA {label}: its config uses {option} of peft, which is not supported; train without.")
    start = stored.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in (*PLAIN_INITS, "true", "false"):
        raise LoraError(
            f"LoRA {label} was started by {printable(start)!r}, which changes the base weights too; save it again "
            "with peft's path_initial_model_for_weight_conversion."
        )
    return AdapterConfig(
        peft_type=kind,
        rank=get("r", (int,), None),
        alpha=get("lora_alpha", (float, int), None) if kind == "LORA" else get("alpha", (float, int), None),
        rank_pattern=_patterns(label, "rank_pattern", get("rank_pattern", (dict,), {})),
        alpha_pattern=_patterns(label, "alpha_pattern", get("alpha_pattern", (dict,), {})),
        rslora=get("use_rslora", (bool,), False),
        dora=get("use_dora", (bool,), False),
    )


def _patterns(label: str, name: str, stored: Mapping[str, Any]) -> Patterns:
    """Regular expressions of module names, each with the number that a config gives it."""
    if len(stored) > MAX_PATTERNS:
        raise LoraError(f"LoRA {label}: {name} has {len(stored)} patterns; at most {MAX_PATTERNS} are read.")
    for pattern, number in stored.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not _is_usable(number):
            raise LoraError(f"LoRA {label}: {name} has {str(number)[:100]!r}; it must be a finite number.")
        if not _is_safe(pattern):
            raise LoraError(f"LoRA {label}: {name} {pattern[:100]!r} is not a simple pattern of module names.")
    return tuple((pattern, float(number)) for pattern, number in stored.items())


def _matched(patterns: Patterns, module: str, default: float | None) -> float | None:
    """The number of the first pattern that matches the end of a module's name, as peft does it."""
    return next((number for pattern, number in patterns if _compiled(pattern).match(module)), default)


def _is_usable(number: float) -> bool:
    return abs(number) < 1e30 and math.isfinite(number)


def _is_safe(pattern: str) -> bool:
    if len(pattern) > MAX_PATTERN or UNSAFE_PATTERN.search(pattern):
        return False
    try:
        _compiled(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


@lru_cache(4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:.*\.)?(?:{pattern})$")
