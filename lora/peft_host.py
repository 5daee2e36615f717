"""LoRAs on the diffusers host: peft adapters where peft has the form, else merged into the weights."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..weights.architecture import Architecture, architecture
from ..weights.layout import ADA_LAYER_NORM, Row, rows, swap_halves
from .load import let_go, load_loras
from .report import Report
from .stack import LoraSpec
from .updates import Full, LowRank, Update

ORIGINALS = "_klein_cns_originals"  # attribute of the transformer: the merged weights as they were, on the CPU


class Part(NamedTuple):
    """One update of one weight in diffusers' layout. ``lora``: its position in the stack."""

    lora: int
    strength: float
    update: Update


def set_loras(pipe: Any, specs: Sequence[LoraSpec]) -> list[Report]:
    """Replace the LoRAs of a ``Flux2KleinPipeline`` by these, exactly.

    Low-rank updates become peft adapters; a DoRA too where it is alone on its weight, for in a stack peft's DoRA
    scales what the others add. The rest is merged, in float32, and taken back with the next call.

    Raises:
        LoraError: a file that cannot be read, or would not apply exactly; no LoRA stays loaded then.
    """
    if not specs:
        remove_loras(pipe)
        return []
    target = architecture_of(pipe.transformer)
    try:
        loras = load_loras([spec.path for spec in specs], target, pipe.transformer)
    finally:
        _take_off(pipe)
    table = {row.bfl: row for row in rows(target.double_blocks, target.single_blocks, target.guidance)}
    parts: dict[str, list[Part]] = defaultdict(list)
    for i, (lora, spec) in enumerate(zip(loras, specs, strict=True)):
        for update in lora.updates if spec.scale != 0 else ():
            row, strength = table[update.weight], spec.scale
            if update.scales_columns and update.rows is None and len(row.diffusers) > 1:
                update, strength = _as_full(pipe.transformer, row, update, strength), 1.0
            for name, own in _diffusers_updates(row, update, target):
                parts[name].append(Part(i, strength, own))
    adapted = {name: found for name, found in parts.items() if _is_for_peft(found)}
    merged = {name: found for name, found in parts.items() if name not in adapted}
    try:
        _merge(pipe.transformer, merged)
        _adapt(pipe, adapted)
    except BaseException:
        _take_off(pipe)
        raise
    return [
        replace(lora.report, strength=spec.scale, how=_how(i, spec, adapted, merged))
        for i, (lora, spec) in enumerate(zip(loras, specs, strict=True))
    ]


def remove_loras(pipe: Any) -> None:
    """Take every LoRA off again; merged weights get their own bits back."""
    let_go(pipe.transformer)
    _take_off(pipe)


def _take_off(pipe: Any) -> None:
    pipe.unload_lora_weights()
    originals: dict[str, Tensor] = getattr(pipe.transformer, ORIGINALS, {})
    for name, weight in originals.items():
        pipe.transformer.get_parameter(name).data.copy_(weight)
    setattr(pipe.transformer, ORIGINALS, {})


def architecture_of(transformer: Any) -> Architecture:
    """The architecture of a ``Flux2Transformer2DModel``."""
    config = transformer.config
    hidden = config.num_attention_heads * config.attention_head_dim
    return architecture(hidden, config.joint_attention_dim, config.num_layers, config.num_single_layers)


def _diffusers_updates(row: Row, update: Update, target: Architecture) -> list[tuple[str, Update]]:
    """The same update, of each of diffusers' weights that it changes."""
    if row.bfl == ADA_LAYER_NORM:
        magnitude = update.magnitude
        if magnitude is not None and not update.scales_columns:
            magnitude = swap_halves(magnitude)
        return [(row.diffusers[0], update._replace(form=update.form.swap_halves(), magnitude=magnitude))]
    if len(row.diffusers) == 1:
        return [(row.diffusers[0], update)]
    length = target.hidden
    if update.rows is not None:
        return [(row.diffusers[update.rows[0] // length], update._replace(rows=None))]
    slices = [slice(i * length, (i + 1) * length) for i in range(len(row.diffusers))]
    return [
        (
            name,
            update._replace(
                form=update.form.take_rows(part),
                magnitude=update.magnitude if update.magnitude is None else update.magnitude[part],
            ),
        )
        for name, part in zip(row.diffusers, slices, strict=True)
    ]


def _as_full(transformer: Any, row: Row, update: Update, strength: float) -> Update:
    """What a DoRA of columns does at a strength, where its norms see q, k and v together that lie apart here."""
    weight = torch.cat([transformer.get_parameter(name).data.float() for name in row.diffusers])
    return update._replace(form=Full(update.to(weight.device).change(strength, weight)), magnitude=None)


def _is_for_peft(parts: Sequence[Part]) -> bool:
    if not all(isinstance(part.update.form, LowRank) and not part.update.scales_columns for part in parts):
        return False
    return len(parts) == 1 or all(part.update.magnitude is None for part in parts)


def _merge(transformer: Any, merged: Mapping[str, Sequence[Part]]) -> None:
    originals = getattr(transformer, ORIGINALS)
    for name, parts in merged.items():
        weight = transformer.get_parameter(name).data
        originals[name] = weight.to("cpu", copy=True)
        base = weight.float()
        change = sum(part.update.to(weight.device).change(part.strength, base) for part in parts)
        weight.copy_(base + change)


def _adapt(pipe: Any, adapted: Mapping[str, Sequence[Part]]) -> None:
    """One adapter a LoRA, and one more for its DoRAs: peft decides that for a whole adapter."""
    adapters: dict[str, dict[str, Part]] = defaultdict(dict)
    for name, parts in adapted.items():
        for part in parts:
            suffix = "" if part.update.magnitude is None else "_dora"
            adapters[f"lora_{part.lora}{suffix}"][name.removesuffix(".weight")] = part
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are what is asked for
        for adapter, modules in adapters.items():
            _load(pipe, adapter, modules)
    if adapters:
        scales = [next(iter(modules.values())).strength for modules in adapters.values()]
        pipe.transformer.set_adapters(list(adapters), scales)


def _load(pipe: Any, adapter: str, modules: Mapping[str, Part]) -> None:
    state: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    ranks: dict[str, int] = {}
    for module, part in modules.items():
        form = part.update.form
        state |= {f"{module}.lora_A.weight": form.down, f"{module}.lora_B.weight": form.up}
        if part.update.magnitude is not None:
            state[f"{module}.lora_magnitude_vector"] = part.update.magnitude.flatten()
        ranks[f"^{module}"], alphas[f"^{module}"] = form.rank, form.scale * form.rank
    config = {
        "r": 1,
        "lora_alpha": 1.0,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": list(modules),
        "use_dora": adapter.endswith("_dora"),
    }
    pipe.transformer.load_lora_adapter(
        {name: tensor.contiguous() for name, tensor in state.items()},
        prefix=None, adapter_name=adapter, metadata=config, low_cpu_mem_usage=True, _pipeline=pipe,
    )  # fmt: skip


def _how(
    lora: int, spec: LoraSpec, adapted: Mapping[str, Sequence[Part]], merged: Mapping[str, Sequence[Part]]
) -> str:
    if spec.scale == 0:
        return "not used at strength 0"
    counts = {
        word: sum(any(part.lora == lora for part in parts) for parts in found.values())
        for word, found in (("as peft adapters", adapted), ("merged", merged))
    }
    total = sum(counts.values())
    return ", ".join(f"{count} of {total} weights {word}" for word, count in counts.items() if count)
