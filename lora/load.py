"""LoRA files in canonical form; the last few are kept, so that changing a strength reads no file again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path

from ..weights.architecture import KLEIN_9B, Architecture
from .canonical import Lora, canonical
from .errors import LoraError
from .read import find_weights, read_lora, stamp
from .stack import MAX_LORAS

KEPT = 2 * MAX_LORAS

_kept: OrderedDict[Hashable, Lora] = OrderedDict()


def examine_lora(path: str | Path, target: Architecture = KLEIN_9B) -> Lora:
    """What a file, or peft folder, is and means for a model; also of one that cannot be used.

    Raises:
        LoraError: nothing there, or a file that cannot be read.
    """
    file = find_weights(path)
    key = (stamp(file), target)
    if key not in _kept:
        _kept[key] = canonical(read_lora(file), target)
        if len(_kept) > KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return _kept[key]


def load_lora(path: str | Path, target: Architecture) -> Lora:
    """The updates of a file, and its report.

    Raises:
        LoraError: also where it was made for another base, does not fit, or is damaged.
    """
    lora = examine_lora(path, target)
    if lora.report.problem:
        raise LoraError(lora.report.problem)
    return lora
