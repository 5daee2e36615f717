"""LoRAs on the diffusers host: peft adapters where peft has the form, else merged into the weights."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..weights.architecture import Architecture, from_sizes
from ..weights.layout import ADA_LAYER_NORM, Row, rows, swap_halves
from .forms import Form, Full, LoHa, LoKr, LowRank, Update
from .load import LoraSpec, let_go, load_loras
from .report import LoraError, Report

# What this host does with each form: the low-rank product that peft gets as an adapter; None where it is merged.
ADAPTERS: dict[type[Form], Callable[[Any], LowRank] | None] = {
    LowRank: lambda form: form,
    LoKr: None,
    LoHa: None,
    Full: None,
}
ORIGINALS = "_klein_cns_originals"  # attribute of the transformer: the merged weights as they were, on the CPU
Placed = tuple[int, float, Update]  # position in the stack, strength, and an update of one weight in diffusers' layout


def set_loras(pipe: Any, specs: Sequence[LoraSpec]) -> list[Report]:
    """Replace the LoRAs of a ``Flux2KleinPipeline`` by these, exactly.

    Low-rank updates become peft adapters, and so does a DoRA that is alone on its weight: in a stack, peft's DoRA
    scales what the others add. The rest is merged, in float32, and taken back with the next call.

    Usage: ``set_loras(pipe, [LoraSpec("style.safetensors", 0.8)])[0].how``.

    Args:
        pipe: a ``Flux2KleinPipeline`` whose transformer takes the LoRAs.
        specs: give the path and the scale of each; an empty list takes every LoRA off.

    Returns:
        a report for each.

    Raises:
        LoraError: a file cannot be read, or would not apply exactly; no LoRA stays loaded then.
    """
    if not specs:
        remove_loras(pipe)
        return []
    target = architecture_of(pipe.transformer)
    try:
        loras = load_loras([spec.path for spec in specs], target, pipe.transformer)
        _check_forms([update.form for lora in loras for update in lora.updates])
    finally:
        _take_off(pipe)
    table = {row.bfl: row for row in rows(target.double_blocks, target.single_blocks, target.guidance)}
    changes: dict[str, list[Placed]] = defaultdict(list)
    for i, (lora, spec) in enumerate(zip(loras, specs, strict=True)):
        for update in lora.updates if spec.scale != 0 else ():
            row, strength = table[update.weight], spec.scale
            if update.scales_columns and update.rows is None and len(row.diffusers) > 1:
                update, strength = _as_full(pipe.transformer, row, update, strength), 1.0
            for name, own in _diffusers_updates(row, update, target):
                changes[name].append((i, strength, own))
    adapted = {name: placed for name, placed in changes.items() if _is_for_peft([own for *_, own in placed])}
    merged = {name: placed for name, placed in changes.items() if name not in adapted}
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
    """Take every LoRA off again: ``remove_loras(pipe)``. Merged weights get their own bits back."""
    let_go(pipe.transformer)
    _take_off(pipe)


def architecture_of(transformer: Any) -> Architecture:
    """The architecture of a ``Flux2Transformer2DModel``: ``architecture_of(pipe.transformer).name``."""
    config = transformer.config
    hidden = config.num_attention_heads * config.attention_head_dim
    return from_sizes(hidden, config.joint_attention_dim, config.num_layers, config.num_single_layers)


def _take_off(pipe: Any) -> None:
    pipe.unload_lora_weights()
    originals: dict[str, Tensor] = getattr(pipe.transformer, ORIGINALS, {})
    for name, weight in originals.items():
        pipe.transformer.get_parameter(name).data.copy_(weight)
    setattr(pipe.transformer, ORIGINALS, {})


def _check_forms(forms: Sequence[Form]) -> None:
    lacking = next((form for form in forms if type(form) not in ADAPTERS), None)
    if lacking is not None:
        raise LoraError(f"the diffusers host cannot put on a {lacking.NAME}; add it to ADAPTERS in lora/peft_host.py.")


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
    """The change of a DoRA of columns at a strength: its norms see q, k and v together, which are separate here."""
    weight = torch.cat([transformer.get_parameter(name).data.float() for name in row.diffusers])
    return update._replace(form=Full(update.to(weight.device).change(strength, weight)), magnitude=None)


def _is_for_peft(updates: Sequence[Update]) -> bool:
    if not all(ADAPTERS[type(update.form)] and not update.scales_columns for update in updates):
        return False
    return len(updates) == 1 or all(update.magnitude is None for update in updates)


def _merge(transformer: Any, merged: Mapping[str, Sequence[Placed]]) -> None:
    originals = getattr(transformer, ORIGINALS)
    for name, placed in merged.items():
        weight = transformer.get_parameter(name).data
        originals[name] = weight.to("cpu", copy=True)
        base = weight.float()
        change = sum(update.to(weight.device).change(strength, base) for _, strength, update in placed)
        weight.copy_(base + change)


def _adapt(pipe: Any, adapted: Mapping[str, Sequence[Placed]]) -> None:
    """One adapter a LoRA, and one more for its DoRAs: peft decides that for a whole adapter."""
    adapters: dict[str, dict[str, Update]] = defaultdict(dict)
    strengths: dict[str, float] = {}
    for name, placed in adapted.items():
        for i, strength, update in placed:
            adapter = f"lora_{i}" if update.magnitude is None else f"lora_{i}_dora"
            adapters[adapter][name.removesuffix(".weight")] = update
            strengths[adapter] = strength
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are what is asked for
        for adapter, updates in adapters.items():
            _load(pipe, adapter, updates)
    if adapters:
        pipe.transformer.set_adapters(list(adapters), [strengths[adapter] for adapter in adapters])


def _load(pipe: Any, adapter: str, updates: Mapping[str, Update]) -> None:
    state: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    ranks: dict[str, int] = {}
    for module, update in updates.items():
        as_low_rank = ADAPTERS[type(update.form)]
        assert as_low_rank is not None  # `_is_for_peft` has seen to it
        form = as_low_rank(update.form)
        state |= {f"{module}.lora_A.weight": form.down, f"{module}.lora_B.weight": form.up}
        if update.magnitude is not None:
            state[f"{module}.lora_magnitude_vector"] = update.magnitude.flatten()
        ranks[f"^{module}"], alphas[f"^{module}"] = form.rank, form.scale * form.rank
    config = {
        "r": 1,
        "lora_alpha": 1.0,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": list(updates),
        "use_dora": adapter.endswith("_dora"),
    }
    pipe.transformer.load_lora_adapter(
        {name: tensor.contiguous() for name, tensor in state.items()},
        prefix=None, adapter_name=adapter, metadata=config, low_cpu_mem_usage=True, _pipeline=pipe,
    )  # fmt: skip


def _how(
    lora: int, spec: LoraSpec, adapted: Mapping[str, Sequence[Placed]], merged: Mapping[str, Sequence[Placed]]
) -> str:
    if spec.scale == 0:
        return "not used at strength 0"
    counts = {
        word: sum(any(i == lora for i, *_ in placed) for placed in found.values())
        for word, found in (("as peft adapters", adapted), ("merged", merged))
    }
    total = sum(counts.values())
    return ", ".join(f"{count} of {total} weights {word}" for word, count in counts.items() if count)
