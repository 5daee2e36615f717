"""LoRA updates added to the outputs of a ComfyUI MODEL's layers; its weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ..lora import Update

FP8 = tuple(getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name))
Addition = Callable[[Tensor, Tensor], None]  # (input, output) of a layer; adds to the output in place
WithStrength = tuple[Update, float]  # an update and the strength of its LoRA


class AddedForward:
    """A layer's forward, and what is added to its output. It takes the place of ``forward``, as ComfyUI's own bypass
    does, since torch.compile does not look at forward hooks."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.forward = layer.forward
        self.replaced = "forward" in vars(layer)  # by another bypass, before this one
        self.additions: list[Addition] = []

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = self.forward(x, *args, **kwargs)
        for addition in self.additions:
            addition(x, output)
        return output


class Bypass:
    """Adds ``strength · update(x)`` of every update to a layer's output. Several of them, and ComfyUI's own, share a
    layer and come off in any order.

    Args:
        updates: of each of the model's weights, by its key.
    """

    def __init__(self, updates: Mapping[str, Sequence[WithStrength]]) -> None:
        self._updates = updates
        self._placed: WeakKeyDictionary[torch.nn.Module, list[Any]] = WeakKeyDictionary()

    def inject(self, patcher: Any) -> None:
        """Add to the layers of a patcher's model, once."""
        if self._placed.get(patcher.model):
            return
        placed = self._placed[patcher.model] = []
        for key, updates in self._updates.items():
            layer = comfy.utils.get_attr(patcher.model, key.removesuffix(".weight"))
            if not isinstance(layer.forward, AddedForward):
                layer.forward = AddedForward(layer)
            addition = _adding(updates)
            layer.forward.additions.append(addition)
            placed.append((layer, layer.forward, addition))

    def eject(self, patcher: Any) -> None:
        """Take off again what `inject` added."""
        for layer, added, addition in self._placed.pop(patcher.model, []):
            added.additions.remove(addition)
            if added.additions or layer.forward is not added:
                continue  # another is still there, or stands before it and will take it off
            if added.replaced:
                layer.forward = added.forward
            else:
                del layer.forward


def is_quantised(model: Any, key: str) -> bool:
    """Whether merging into this weight would round it to its quantised form again."""
    weight = comfy.utils.get_attr(model.model, key)
    return isinstance(weight, QuantizedTensor) or weight.dtype in FP8


def _adding(updates: Sequence[WithStrength]) -> Addition:
    """The factors are moved to the activations' device and dtype at the first call."""
    moved: dict[tuple[torch.device, torch.dtype], list[WithStrength]] = {}

    def add(x: Tensor, output: Tensor) -> None:
        where = (x.device, x.dtype)
        if where not in moved:
            moved.clear()
            moved[where] = [(update.to(*where), strength) for update, strength in updates]
        for update, strength in moved[where]:
            start, length = update.rows or (0, output.shape[-1])
            output.narrow(-1, start, length).add_(update.form.apply(x), alpha=strength)

    return add
