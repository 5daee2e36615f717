"""LoRA files in canonical form, in memory as long as a model uses them.

Several models, or clones of one, share what is loaded. Besides, the last few are kept for the models that they were
loaded for, on the CPU and bounded in bytes, so that changing a strength reads no file again.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from ..weights.architecture import KLEIN_9B, Architecture
from .canonical import Lora, canonical
from .errors import LoraError
from .read import find_weights, label_of, read_lora, stamp
from .stack import MAX_LORAS

MAX_KEPT = 2**30  # bytes, of all LoRAs that are kept
CLOCK_TICK = 0.02  # seconds; file systems step their times by up to this

_loaded: weakref.WeakValueDictionary[Hashable, Lora] = weakref.WeakValueDictionary()
_kept: list[tuple[weakref.ref[Any], Lora]] = []  # each with the model that it is kept for, the latest first


def examine_lora(path: str | Path, target: Architecture = KLEIN_9B) -> Lora:
    """What a file, or peft folder, is and means for a model; also of one that cannot be used.

    Raises:
        LoraError: nothing there, or a file that cannot be read.
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


def _settle(file: Path) -> None:
    """Wait until a later write to a file that was written just now would show in its time."""
    age = time.time() - file.stat().st_mtime
    if 0 <= age < CLOCK_TICK:
        time.sleep(CLOCK_TICK - age)


def load_lora(path: str | Path, target: Architecture) -> Lora:
    """The updates of a file, and its report.

    Raises:
        LoraError: also where it was made for another base, does not fit, or is damaged.
    """
    lora = examine_lora(path, target)
    if lora.report.problem:
        raise LoraError(lora.report.problem)
    return lora


def load_loras(paths: Sequence[str | Path], target: Architecture, model: Any) -> list[Lora]:
    """The LoRAs of a stack; the last of them are kept until the model is gone.

    Args:
        model: the module whose weights they change; clones that share it count as one.

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
    """Keep no LoRA for a model any longer. Those that are on it stay in memory with it."""
    _let_go(weakref.ref(model))


def _let_go(owner: weakref.ref[Any]) -> None:
    _kept[:] = [entry for entry in _kept if entry[0] != owner]
