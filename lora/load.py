"""LoRAs as a user asks for them, loaded: at most three files, each with a scale.

What is loaded stays in memory as long as a model uses it, and several models, or clones of one, share it. Besides, the
last few are kept for the models that they were loaded for, on the CPU and bounded in bytes, so that changing a strength
reads no file again.
"""

from __future__ import annotations

import math
import numbers
import os
import re
import reprlib
import time
import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..endpoint import MAX_LORAS
from ..weights.architecture import KLEIN_9B, Architecture
from .canonical import Lora, canonical
from .read import find_weights, label_of, read_lora, stamp
from .report import LoraError

MAX_KEPT = 2**30  # bytes, of all LoRAs that are kept
CLOCK_TICK = 0.02  # seconds; file systems step their times by up to this
DRIVE = re.compile(r"(?:\\\\\?\\)?[A-Za-z]")  # of Windows, before its colon: C or \\?\C

_loaded: weakref.WeakValueDictionary[Hashable, Lora] = weakref.WeakValueDictionary()
_kept: list[tuple[weakref.ref[Any], Lora]] = []  # each with the model that it is kept for, the latest first


class LoraSpec(NamedTuple):
    """One LoRA that a user asks for; the endpoint's ``{"path", "scale"}``: ``LoraSpec("style.safetensors", 0.8)``."""

    path: str
    scale: float = 1.0


def parse_loras(loras: Iterable[Any]) -> list[LoraSpec]:
    """At most three LoRAs from ``PATH``, ``PATH:SCALE``, (path, scale) or the endpoint's mapping.

    >>> parse_loras([])
    []

    Usage: ``parse_loras(["style.safetensors:0.8"])`` gives ``[LoraSpec(path='style.safetensors', scale=0.8)]``.

    Raises:
        LoraError: there are more than three, a scale is not a finite number, or a file or peft folder does not exist.
    """
    if isinstance(loras, (str, bytes, Mapping)) or not isinstance(loras, Iterable):
        raise LoraError(f"loras is {loras!r}; give a list of PATH:SCALE or of objects with path and scale.")
    specs = [_parse(lora) for lora in loras]
    if len(specs) > MAX_LORAS:
        raise LoraError(f"{len(specs)} LoRAs were given; at most {MAX_LORAS} are allowed. Leave some out.")
    for spec in specs:
        find_weights(spec.path)
    return specs


def examine_lora(path: str | Path, target: Architecture = KLEIN_9B) -> Lora:
    """Tell what a file or peft folder is and means for a model, also where it cannot be used.

    Usage: ``print(examine_lora("style.safetensors").report)``.

    Args:
        path: names a .safetensors file, or a peft or diffusers folder.
        target: says for which model.

    Raises:
        LoraError: there is no such file, or it cannot be read.
    """
    file = find_weights(path)
    before = stamp(file)
    lora = _loaded.get((before, target))
    if lora is None:
        _settle(file)
        lora = canonical(read_lora(file), target)
        if stamp(file) != before:
            raise LoraError(f"LoRA {label_of(file)} changed while it was read; run again when it is complete.")
        _loaded[before, target] = lora
    return lora


def load_lora(path: str | Path, target: Architecture) -> Lora:
    """The updates of a file, and its report.

    Usage: ``load_lora("style.safetensors", KLEIN_9B).updates``.

    Args:
        path: names a .safetensors file, or a peft or diffusers folder.
        target: says for which model.

    Raises:
        LoraError: there is no such file, or it is damaged, was made for another base, or does not fit.
    """
    lora = examine_lora(path, target)
    if lora.report.problem:
        raise LoraError(lora.report.problem)
    return lora


def load_loras(paths: Sequence[str | Path], target: Architecture, model: Any) -> list[Lora]:
    """The LoRAs of a stack; the last of them are kept until the model is gone.

    Usage: ``load_loras(["style.safetensors", "face.safetensors"], KLEIN_9B, pipe.transformer)``.

    Args:
        paths: name the files or folders, in the order of the stack.
        target: says which architecture the model has.
        model: is the module whose weights they change; clones that share it count as one.

    Raises:
        LoraError: as `load_lora`.
    """
    loras = [load_lora(path, target) for path in paths]
    owner = weakref.ref(model, _let_go)
    others = [entry for entry in _kept if entry[1] not in loras]
    _kept[:] = [(owner, lora) for lora in dict.fromkeys(loras)] + others
    del _kept[MAX_LORAS:]
    while sum(lora.size for _, lora in _kept) > MAX_KEPT:
        _kept.pop()
    return loras


def let_go(model: Any) -> None:
    """Drop the LoRAs kept for a model: ``let_go(pipe.transformer)``. Those on the model stay in memory with it."""
    _let_go(weakref.ref(model))


def _let_go(owner: weakref.ref[Any]) -> None:
    _kept[:] = [entry for entry in _kept if entry[0] != owner]


def _settle(file: Path) -> None:
    """Wait until a later write to a file that was written just now would show in its time."""
    age = time.time() - file.stat().st_mtime
    if 0 <= age < CLOCK_TICK:
        time.sleep(CLOCK_TICK - age)


def _parse(lora: Any) -> LoraSpec:
    if isinstance(lora, Mapping):
        extra = set(lora) - {"path", "scale"}
        if extra or "path" not in lora:
            raise LoraError(f"LoRA {dict(lora)!r} must have 'path' and may have 'scale', nothing else.")
        lora = (lora["path"], lora.get("scale", 1.0))
    if isinstance(lora, (str, Path)):
        lora = _split(str(lora))
    if not (isinstance(lora, tuple) and len(lora) == 2 and isinstance(lora[0], (str, Path))):
        raise LoraError(f"LoRA {lora!r} is neither PATH:SCALE, a pair, nor an object with path and scale.")
    path, scale = lora
    if str(path).startswith(("http://", "https://")):
        raise LoraError(f"LoRA {path} is a web address; download it and give the file.")
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not _is_finite(scale):
        raise LoraError(f"the scale of LoRA {path} is {reprlib.repr(scale)}; it must be a finite number.")
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
        raise LoraError(f"LoRA {text}: {scale!r} after the colon is not a number; write PATH:SCALE.") from error


def _is_finite(scale: numbers.Real) -> bool:
    try:
        return math.isfinite(scale)
    except OverflowError:  # a whole number that no float holds
        return False
