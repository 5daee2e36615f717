"""Encodings that are made once and asked for again: a cache bounded in bytes, in main memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


class TensorCache:
    """The values asked for last, by key; a value is a tensor, or tensors in lists, tuples and dicts of any depth.

    The cache keeps a copy on the CPU and hands out a copy of that, so that nobody can change what it keeps::

        cache.get(("prompt", text), lambda: encode(text), device)

    Args:
        max_bytes: bounds all tensors together; the values that were asked for longest ago go first, and a value that
            alone is larger is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any], device: torch.device) -> Any:
        """The value under a key.

        Args:
            key: names the value.
            make: makes the value where there is none; it is then kept.
            device: takes the tensors.
        """
        if key in self._kept:
            self._kept.move_to_end(key)
            return _copied(self._kept[key], device)
        value = make()
        size = _bytes(value)
        if size <= self.max_bytes:
            self._kept[key] = _copied(value, torch.device("cpu"))
            self.bytes += size
            while self.bytes > self.max_bytes:
                self.bytes -= _bytes(self._kept.popitem(last=False)[1])
        return value


def _copied(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {name: _copied(part, device) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(part, device) for part in value)
    return value


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return 0
    return sum(map(_bytes, value))
