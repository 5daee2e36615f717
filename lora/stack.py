"""What a user asks for: at most three LoRA files, each with a scale."""

from __future__ import annotations

import math
import numbers
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .read import find_weights

MAX_LORAS = 3
DRIVE = re.compile(r"(?:\\\\\?\\)?[A-Za-z]")  # of Windows, before its colon: C or \\?\C


class LoraSpec(NamedTuple):
    """One LoRA of a stack. The endpoint's ``{"path", "scale"}``."""

    path: str
    scale: float = 1.0


def parse_loras(loras: Iterable[Any]) -> list[LoraSpec]:
    """At most three LoRAs from ``PATH``, ``PATH:SCALE``, (path, scale) or the endpoint's mapping.

    Raises:
        ValueError: more than three, a scale that is no finite number, no file or peft folder there.
    """
    if isinstance(loras, (str, bytes, Mapping)) or not isinstance(loras, Iterable):
        raise ValueError(f"loras is {loras!r}; give a list of PATH:SCALE or of objects with path and scale.")
    specs = [_parse(lora) for lora in loras]
    if len(specs) > MAX_LORAS:
        raise ValueError(f"{len(specs)} LoRAs were given; at most {MAX_LORAS} are allowed. Leave some out.")
    for spec in specs:
        find_weights(spec.path)
    return specs


def _parse(lora: Any) -> LoraSpec:
    if isinstance(lora, Mapping):
        extra = set(lora) - {"path", "scale"}
        if extra or "path" not in lora:
            raise ValueError(f"LoRA {dict(lora)!r} must have 'path' and may have 'scale', nothing else.")
        lora = (lora["path"], lora.get("scale", 1.0))
    if isinstance(lora, (str, Path)):
        lora = _split(str(lora))
    if not (isinstance(lora, tuple) and len(lora) == 2 and isinstance(lora[0], (str, Path))):
        raise ValueError(f"LoRA {lora!r} is neither PATH:SCALE, a pair, nor an object with path and scale.")
    path, scale = lora
    if str(path).startswith(("http://", "https://")):
        raise ValueError(f"LoRA {path} is a web address; download it and give the file.")
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not _is_finite(scale):
        raise ValueError(f"the scale of LoRA {path} is {reprlib.repr(scale)}; it must be a finite number.")
    return LoraSpec(str(path), float(scale))


def _split(text: str) -> tuple[str, float]:
    """The path and the scale of ``PATH:SCALE`` or ``PATH``. A drive is one on every system."""
    path, colon, scale = text.rpartition(":")
    if not colon or "://" in text or os.path.exists(text):
        return text, 1.0
    try:
        return path, float(scale)
    except ValueError as error:
        if DRIVE.fullmatch(path):
            return text, 1.0
        raise ValueError(f"LoRA {text}: {scale!r} after the colon is no number; write PATH:SCALE.") from error


def _is_finite(scale: numbers.Real) -> bool:
    try:
        return math.isfinite(scale)
    except OverflowError:  # a whole number that no float holds
        return False
