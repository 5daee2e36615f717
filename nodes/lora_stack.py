"""Klein LoRA Stack: up to three LoRAs of any format on a MODEL, exactly, with a report of each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker

from ..lora import MAX_LORAS, Lora, Report, load_loras
from ..lora.read import stamp
from .common import CATEGORY, is_inside
from .lora_patches import APPLY, apply_updates, architecture_of
from .messages import SAYS, said

FOLDER = "loras"
NONE = "none"
STRENGTH = 1.0
SLOTS = range(1, MAX_LORAS + 1)
APPLIED = "klein_loras"  # attachment of a MODEL: (name, LoRA) of those that this node put on it
NO_MODEL = "the model output is used, but no model is connected; connect one to Klein LoRA Stack."
Entry = tuple[str, float, float]  # (name, strength_model, strength_clip), as other packs have it

LoraStack = io.Custom("LORA_STACK")


class KleinLoraStack(io.ComfyNode):
    """MODEL and LoRAs in; MODEL with them, and LORA_STACK out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KleinLoraStack",
            display_name="Klein LoRA Stack",
            category=CATEGORY,
            description=f"Applies up to {MAX_LORAS} LoRAs of any format, and says how much of each applies.",
            search_aliases=["lora", "load lora", "lora stack", "lokr", "dora", "klein lora"],
            inputs=[
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model to change. Without one the stack is only passed on, for another stack or a "
                    "remote run.",
                ),
                *(part for slot in SLOTS for part in _slot(slot)),
                LoraStack.Input(
                    "lora_stack",
                    optional=True,
                    tooltip=f"LoRAs of another stack, put before these. {MAX_LORAS} are allowed in all.",
                ),
                io.Combo.Input(
                    "apply",
                    options=list(APPLY),
                    default=APPLY[0],
                    optional=True,
                    advanced=True,
                    tooltip="merge adds the LoRAs to the weights, bypass to the layers' outputs. auto bypasses where "
                    "merging would round quantised weights (fp8, NVFP4) again, and merges elsewhere and for DoRA.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the LoRAs."),
                LoraStack.Output(display_name="lora_stack", tooltip="All LoRAs, for another stack or a remote run."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            **SAYS,
        )

    @classmethod
    def validate_inputs(cls, lora_1: Any = None, lora_2: Any = None, lora_3: Any = None) -> bool:
        return True  # a missing file fails when the node runs, with the remedy

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        """The files' own times and sizes: a LoRA that was trained on is another one under the same name."""
        names = [chosen(inputs, slot) for slot in SLOTS]
        paths = [folder_paths.get_full_path(FOLDER, name) for name in names if name and is_inside(name)]
        return [stamp(Path(path)) for path in paths if path]

    @classmethod
    def execute(
        cls, apply: str = APPLY[0], model: Any = None, lora_stack: Sequence[Any] | None = None, **slots: Any
    ) -> io.NodeOutput:
        stack = [*given_stack(lora_stack), *own_stack(slots)]
        check_count(stack, model)
        paths = [find(name) for name, *_ in stack]
        if model is None:
            text = "\n".join(f"{name} at {strength:g}: passed on, no model is connected" for name, strength, _ in stack)
            reports: list[Report] = []
            if is_used(cls.hidden.prompt, cls.hidden.unique_id):
                raise ValueError(NO_MODEL)
            model = ExecutionBlocker(NO_MODEL)
        else:
            model, reports = with_loras(model, stack, paths, apply)
            text = "\n".join(map(str, reports))
        reported = [report.to_dict() for report in reports]
        return io.NodeOutput(model, stack, ui={**said(text or "no LoRA is chosen"), "klein_loras": reported})


def is_used(prompt: Any, unique_id: str) -> bool:
    """Whether a node of the graph takes this one's MODEL."""
    nodes = prompt.values() if isinstance(prompt, dict) else ()
    return any([str(unique_id), 0] == link for node in nodes for link in node.get("inputs", {}).values())


def given_stack(stack: Any) -> list[Entry]:
    """The entries of a connected LORA_STACK, of this node or another pack's.

    Raises:
        ValueError: no list of (name, strength_model, strength_clip), or a strength that is not a finite number.
    """
    if stack is None:
        return []
    if not isinstance(stack, (list, tuple)):
        raise ValueError(f"lora_stack is a {type(stack).__name__}; it must be a list of LoRAs with two strengths each.")
    entries = []
    for entry in stack:
        if not isinstance(entry, (list, tuple)) or len(entry) != 3 or not isinstance(entry[0], str):
            raise ValueError(f"lora_stack holds {str(entry)[:100]}; allowed are (name, strength_model, strength_clip).")
        name, *strengths = entry
        entries.append((name, *(_finite(f"the strength of {name} in lora_stack", value) for value in strengths)))
    return entries


def own_stack(slots: Mapping[str, Any]) -> list[Entry]:
    """The entries of the node's own combos; both strengths are the slot's."""
    strengths = {slot: _finite(f"strength_{slot}", slots.get(f"strength_{slot}", STRENGTH)) for slot in SLOTS}
    names = {slot: chosen(slots, slot) for slot in SLOTS}
    return [(name, strengths[slot], strengths[slot]) for slot, name in names.items() if name]


def chosen(slots: Mapping[str, Any], slot: int) -> str | None:
    """The name in a slot; None where there is none, as a prompt of the API may say it: null, ``None``, no text, no key.

    Raises:
        ValueError: no text.
    """
    name = slots.get(f"lora_{slot}")
    if name is None or (isinstance(name, str) and name.strip().lower() in ("", NONE)):
        return None
    if not isinstance(name, str):
        raise ValueError(f"lora_{slot} is {str(name)[:100]}; give the name of a file in models/{FOLDER}/, or {NONE}.")
    return name


def check_count(stack: Sequence[Entry], model: Any) -> None:
    """Refuse more than three in all, and the same LoRAs by two ways.

    Raises:
        ValueError
    """
    applied = _applied(model)
    twice = [name for name, *_ in stack if name in {name for name, _ in applied}]
    if twice:
        raise ValueError(
            f"{twice[0]} is on the model already; from another Klein LoRA Stack connect either its model or its "
            "lora_stack, not both."
        )
    count = len(applied) + len(stack)
    if count > MAX_LORAS:
        names = ", ".join([*(name for name, _ in applied), *(name for name, *_ in stack)])
        raise ValueError(
            f"{count} LoRAs are stacked ({names}); at most {MAX_LORAS} are allowed, chained stacks included. "
            "Set some to none."
        )


def find(name: str) -> str:
    """The path of a LoRA in ComfyUI's folder.

    Raises:
        ValueError: it does not exist (any more), or its name would leave the folder.
    """
    if not is_inside(name):
        raise ValueError(f"LoRA {name!r} lies outside models/{FOLDER}/; move it there and choose it by its name.")
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise ValueError(f"LoRA {name!r} does not exist; put it into models/{FOLDER}/, or choose another.")
    return path


def with_loras(model: Any, stack: Sequence[Entry], paths: Sequence[str], apply: str) -> tuple[Any, list[Report]]:
    """The model with the LoRAs on it, and a report of each."""
    if not stack:
        return model, []
    target = architecture_of(model)
    loras = load_loras(paths, target, model.model)
    strengths = [strength for _, strength, _ in stack]
    model, how = apply_updates(model, [(lora.updates, s) for lora, s in zip(loras, strengths, strict=True)], apply)
    names = [name for name, *_ in stack]
    model.set_attachments(APPLIED, (*_applied(model), *zip(names, loras, strict=True)))
    return model, [
        replace(lora.report, file=name, strength=strength, how=_how(counts))
        for lora, (name, strength, _), counts in zip(loras, stack, how, strict=True)
    ]


def _slot(slot: int) -> tuple[io.Input, io.Input]:
    return (
        io.Combo.Input(
            f"lora_{slot}",
            options=[NONE, *folder_paths.get_filename_list(FOLDER)],
            default=NONE,
            optional=True,
            tooltip=f"A LoRA of models/{FOLDER}/, in any format.",
        ),
        io.Float.Input(
            f"strength_{slot}",
            default=STRENGTH,
            min=-100.0,
            max=100.0,
            step=0.05,
            optional=True,
            tooltip="How strongly it changes the model; 0 leaves it out, below 0 turns it around.",
        ),
    )


def _applied(model: Any) -> tuple[tuple[str, Lora], ...]:
    return (model.get_attachment(APPLIED) or ()) if model is not None else ()


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; it must be a finite number.")
    return float(value)


def _how(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {word}" for word, count in counts.items()) or "not used at strength 0"
