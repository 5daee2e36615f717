"""LoRA updates on a ComfyUI MODEL: as patches of its weights (merge), or added to its layers' outputs (bypass)."""

from __future__ import annotations

import re
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from comfy.patcher_extension import PatcherInjection
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter, WeightAdapterBase
from torch import Tensor

from ..lora import Form, Full, LoHa, LoKr, LowRank, Update
from ..lora.forms import form_named
from ..weights.architecture import Architecture, from_sizes
from .lora_bypass import Bypass, WithStrength, is_quantised

APPLY = ("auto", "merge", "bypass")
PREFIX = "diffusion_model."


class DoraPatch(WeightAdapterBase):
    """The DoRAs of one weight: each changes the base weight as if it were the only one, and the changes add up.

    ``weights``: (form's name, its fields, magnitude, rows, strength) of each, plain tuples that ComfyUI can move.
    """

    name = "klein_dora"

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    @classmethod
    def of(cls, weight: str, updates: Sequence[WithStrength]) -> DoraPatch:
        """The patch of a weight that makes these updates of it."""
        entries = ((one.form.NAME, one.form.fields(), one.magnitude, one.rows, strength) for one, strength in updates)
        return cls({weight}, tuple(entries))

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Any,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        """ComfyUI's name for what changes a weight in place."""
        base = weight.float()
        total = torch.zeros_like(base)
        for form, fields, magnitude, rows, own in self.weights:
            update = Update(key, rows, form_named(form)(*fields), magnitude).to(weight.device)
            update.within(total).add_(update.change(own, base))
        weight += function((strength * total).to(weight.dtype))
        return weight


def architecture_of(model: Any) -> Architecture:
    """The architecture of a MODEL.

    >>> architecture_of(model).name
    'FLUX.2 [klein] 9B'

    Raises:
        ValueError: it is not a FLUX.2.
    """
    shapes = _shapes(model)
    image, text = shapes.get("img_in.weight"), shapes.get("txt_in.weight")
    if not image or not text or "double_stream_modulation_img.lin.weight" not in shapes:
        raise ValueError("the model is not a FLUX.2, so no klein LoRA fits it; connect FLUX.2 [klein] 9B.")
    doubles, singles = (
        1 + max(int(key.split(".")[1]) for key in shapes if key.startswith(f"{kind}_blocks."))
        for kind in ("double", "single")
    )
    return from_sizes(image[0], text[1], doubles, singles)


def apply_updates(
    model: Any, stack: Sequence[tuple[Sequence[Update], float]], apply: str
) -> tuple[Any, list[Counter[str]]]:
    """A clone of a MODEL with LoRAs on it, beside what it already carries.

    >>> model, counts = apply_updates(model, [(lora.updates, 0.8)], "auto")

    Args:
        stack: the updates and the strength of each LoRA.
        apply: merge; bypass; or auto, which bypasses where merging would requantise, a DoRA excepted.

    Returns:
        the clone, and for each LoRA how many of its updates were ``merged`` and ``bypassed``.

    Raises:
        ValueError: bypass of a DoRA, which needs the base weight; a form that has no patch.
    """
    clone = model.clone()
    names = set(_shapes(clone))
    bypassed: dict[str, list[WithStrength]] = defaultdict(list)
    doras: dict[str, list[WithStrength]] = defaultdict(list)
    how = []
    for updates, strength in stack:
        patches: dict[Any, Any] = {}
        counts: Counter[str] = Counter()
        for update in updates if strength != 0 else ():
            key = PREFIX + _own_name(update.weight, names)
            bypass = _is_bypassed(clone, key, update, apply)
            counts["bypassed" if bypass else "merged"] += 1
            if bypass:
                bypassed[key].append((update, strength))
            elif update.magnitude is not None:
                doras[key].append((update, strength))
            else:
                patches[key if update.rows is None else (key, (0, *update.rows))] = _patch(update.form)
        _add_patches(clone, patches, strength)
        how.append(counts)
    _add_doras(clone, doras)
    if bypassed:
        added = Bypass(bypassed)
        # A name of its own: ComfyUI compares the names to tell whether two clones have the same weights.
        clone.set_injections(f"klein_lora_{uuid.uuid4()}", [PatcherInjection(added.inject, added.eject)])
    return clone, how


def _is_bypassed(model: Any, key: str, update: Update, apply: str) -> bool:
    if update.magnitude is not None:
        if apply == "bypass":
            raise ValueError(
                f"apply is bypass, but a LoRA has a DoRA of {update.weight}, which must see that weight; "
                "choose auto or merge."
            )
        return False
    is_matrix = len(update.form.shape) == 2  # a norm's scale has no product to add
    return is_matrix and (apply == "bypass" or (apply == "auto" and is_quantised(model, key)))


def _add_patches(model: Any, patches: Mapping[Any, Any], strength: float = 1.0) -> None:
    added = set(model.add_patches(patches, strength))
    missed = [key for key in patches if key not in added]
    if missed:
        raise ValueError(f"the model does not take a change of {missed[0]}; choose apply bypass, or load it otherwise.")


def _patch(form: Form) -> Any:
    """ComfyUI's own patch for a form."""
    if type(form) not in PATCHES:
        raise ValueError(f"ComfyUI's side cannot merge a {form.NAME}; add it to PATCHES in nodes/lora_patches.py.")
    return PATCHES[type(form)](form)


def _low_rank(form: LowRank) -> LoRAAdapter:
    """The adapter scales by alpha / rank."""
    return LoRAAdapter(set(), (form.up, form.down, form.scale * form.rank, None, None, None))


def _loha(form: LoHa) -> LoHaAdapter:
    """The adapter scales by alpha / rank."""
    alpha = form.scale * form.rank
    return LoHaAdapter(set(), (form.w1_a, form.w1_b, alpha, form.w2_a, form.w2_b, None, None, None))


def _full(form: Full) -> tuple[str, tuple[Tensor]]:
    return ("diff", (form.diff,))


def _lokr(form: LoKr) -> LoKrAdapter:
    """The adapter scales by alpha / rank."""
    if form.rank is None and form.scale != 1:  # whole factors, which the adapter never scales
        form = LoKr((form.scale * form.w1[0].float(),), form.w2, 1.0)
    w1, w2 = (((factor[0], None, None) if len(factor) == 1 else (None, *factor)) for factor in (form.w1, form.w2))
    alpha = form.scale * form.rank if form.rank else None
    return LoKrAdapter(set(), (w1[0], w2[0], alpha, w1[1], w1[2], w2[1], w2[2], None, None))


# What ComfyUI gets of each form where it is merged.
PATCHES: dict[type[Form], Callable[[Any], Any]] = {LowRank: _low_rank, LoKr: _lokr, LoHa: _loha, Full: _full}


def _add_doras(model: Any, doras: Mapping[str, Sequence[WithStrength]]) -> None:
    """Before every patch that only adds, so that they see the base weight; together with the DoRAs that are there."""
    added = {}
    for key, updates in doras.items():
        patches = model.patches.get(key, [])
        mine = DoraPatch.of(key, updates)
        there = next((i for i, patch in enumerate(patches) if isinstance(patch[1], DoraPatch)), None)
        if there is not None:
            mine.weights = patches.pop(there)[1].weights + mine.weights
        added[key] = mine
    _add_patches(model, added)
    for key in added:
        patches = model.patches[key]
        place = 1 + max((i for i, patch in enumerate(patches[:-1]) if not _only_adds(patch)), default=-1)
        patches.insert(place, patches.pop())


def _only_adds(patch: tuple[Any, ...]) -> bool:
    """Whether a patch adds the same change to any weight."""
    _, change, strength_model, _, _ = patch
    if strength_model != 1:
        return False
    if isinstance(change, WeightAdapterBase):
        return isinstance(change, (LoRAAdapter, LoKrAdapter, LoHaAdapter)) and not _has_dora(change)
    return len(change) == 1 or change[0] == "diff"


def _has_dora(adapter: WeightAdapterBase) -> bool:
    position = {LoRAAdapter: 4, LoKrAdapter: 8, LoHaAdapter: 7}[type(adapter)]
    return adapter.weights[position] is not None


def _own_name(weight: str, names: Container[str]) -> str:
    """ComfyUI's name of a weight; its norms say weight where BFL says scale."""
    return weight if weight in names else re.sub(r"scale$", "weight", weight)


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """BFL's name -> shape of every weight."""
    named = ((name, weight) for name, weight in model.model.named_parameters() if name.startswith(PREFIX))
    return {name.removeprefix(PREFIX): tuple(weight.shape) for name, weight in named}
