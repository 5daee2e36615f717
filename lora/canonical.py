"""Any LoRA file to its canonical form: updates of single weights, and a report of what became of every key."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..weights.architecture import Architecture
from ..weights.layout import ADA_LAYER_NORM, swap_halves
from .base import base_of, expected_shape
from .errors import LoraError
from .forms import Change, Module, change_of
from .names import MAX_KEY, NO_BIAS, OTHER_KINDS, TEXT_ENCODER, UNSUPPORTED, Parameter, Place, locate, parse
from .read import RawLora, is_finite
from .report import Report, printable, span, training, trigger_words
from .updates import Update

NOT_FOR_TEXT = "a text encoder's weight; a klein LoRA changes the transformer alone"
LAYOUTS = {"bfl": "BFL names", "diffusers": "diffusers names"}
LeftOut = dict[str, str]  # module or key -> why


@dataclass(frozen=True, eq=False)
class Lora:
    """A file in canonical form. Where ``report.problem`` says why it cannot be used, there are no updates."""

    updates: tuple[Update, ...]
    report: Report

    @property
    def size(self) -> int:
        """Bytes of its tensors in memory."""
        storages = [tensor.untyped_storage() for update in self.updates for tensor in update.tensors()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())  # q, k and v may share


def canonical(raw: RawLora, target: Architecture) -> Lora:
    """The updates of ``target``'s weights that a file means, exactly.

    A file that cannot be used becomes a report with a ``problem``; nothing is raised. Left out, and reported, is only
    what klein does not have (a text encoder in the LoRA's reach, biases, unknown modules) or a kind of LoRA that is
    not supported.
    """
    parsed = {key: parse(key) for key in raw.keys}
    modules, left_out, text = _modules(raw, parsed)
    report = Report(
        raw.label,
        total=len(modules) + len(left_out),
        trigger_words=trigger_words(raw.metadata),
        training=training(raw.metadata),
        note=raw.note,
    )
    try:
        _check_adapters(raw.label, {one.adapter for one in parsed.values() if one and one.adapter})
        changes: list[Change] = []
        for module in modules:
            unusable = _unusable(module)
            left_out |= unusable
            if module.name not in unusable:
                changes.append(change_of(raw.label, module, raw.config))
    except LoraError as error:
        return Lora((), replace(report, left_out=_listed(left_out, text), problem=str(error)))
    report = replace(
        report,
        left_out=_listed(left_out, text),
        format=_format(changes),
        base=base_of(target, [(change.module.place, change.form.shape) for change in changes], left_out),
        rank=span(change.form.rank for change in changes if change.form.rank is not None),
        alpha=span(change.alpha for change in changes if change.alpha is not None),
    )
    try:
        _check(raw.label, changes, report, target)
    except LoraError as error:
        return Lora((), replace(report, problem=str(error)))
    return Lora(tuple(_update(change, target) for change in changes), replace(report, applied=len(changes)))


def _modules(raw: RawLora, parsed: Mapping[str, Parameter | None]) -> tuple[list[Module], LeftOut, LeftOut]:
    """The modules of FLUX.2 in a file; what is none; and what belongs to a text encoder."""
    modules: dict[str, Module] = {}
    left_out: LeftOut = {}
    text: LeftOut = {}
    for key in raw.keys:
        parameter = parsed[key]
        name = parameter.module if parameter else key
        place = locate(name) if parameter else None
        if parameter and place:
            module = modules.setdefault(name, Module(name, place, {}, [], {}))
            if parameter.split is None:
                module.parameters.setdefault(parameter.role, []).append(raw.tensors[key])
            else:
                module.splits[parameter.role] = module.splits.get(parameter.role, 0) + 1
        elif TEXT_ENCODER.search(name[:512]):
            text[printable(name)] = NOT_FOR_TEXT
        elif parameter:
            left_out[printable(name)] = OTHER_KINDS.get(parameter.role, "FLUX.2 has no such module")
        else:
            left_out[printable(name)] = "no parameter of a known kind of LoRA"
    for key in [key for key in raw.keys if parsed[key] is None]:
        module = _owner(key, modules)
        if module:
            left_out.pop(printable(key), None)
            module.strays.append(printable(key[len(module.name) + 1 :]))
    return list(modules.values()), left_out, text


def _owner(key: str, modules: Mapping[str, Module]) -> Module | None:
    """The module that a key of no known kind belongs to, if the file changes it."""
    parts = key[:MAX_KEY].split(".")
    names = (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
    return next((modules[name] for name in names if name in modules), None)


def _check_adapters(label: str, adapters: Collection[str]) -> None:
    if len(adapters) > 1:
        names = ", ".join(sorted(map(printable, adapters))[:5])
        raise LoraError(f"LoRA {label} holds several adapters ({names}); save the one that you want alone.")


def _unusable(module: Module) -> LeftOut:
    """Why a module, or a bias beside it, is left out; empty where all of it is used."""
    unsupported = {role: UNSUPPORTED[role] for role in module.parameters if role in UNSUPPORTED}
    whole = next((why for why in unsupported.values() if why != NO_BIAS), None)
    if whole:
        return {module.name: whole}
    if not module.strays and not module.splits and set(module.parameters) <= {"alpha", "scalar", *unsupported}:
        return {module.name: NO_BIAS if unsupported else "an alpha without factors"}
    return {f"{module.name}.{role}": why for role, why in unsupported.items()}


def _listed(left_out: LeftOut, text: LeftOut) -> tuple[tuple[str, str], ...]:
    return (*left_out.items(), *text.items())


def _format(changes: Sequence[Change]) -> str:
    """``LoRA, diffusers names after 'transformer.'``"""
    if not changes:
        return "unknown"
    kinds = dict.fromkeys(f"{change.form.name}{' with DoRA' * (change.magnitude is not None)}" for change in changes)
    named = dict.fromkeys(
        f"{LAYOUTS[place.layout]}{f' after {place.prefix!r}' if place.prefix else ''}"
        for place in (change.module.place for change in changes)
    )
    return f"{' and '.join(kinds)}, {' and '.join(list(named)[:3])}"


def _check(label: str, changes: Sequence[Change], report: Report, target: Architecture) -> None:
    """Refuse what would apply in part, wrongly, or not at all."""
    if report.base not in (target.name, "unknown"):
        raise LoraError(
            f"LoRA {label} was made for {report.base}, the model is {target.name}; get a LoRA that was trained on it."
        )
    if not changes:
        kinds = dict.fromkeys(why for _, why in report.left_out)
        raise LoraError(
            f"LoRA {label} holds nothing that applies to {target.name} ({'; '.join(kinds)}); get one trained on it."
        )
    for change in changes:
        _check_shape(label, change, target)
    _check_once(label, [change.module for change in changes])
    _check_whole_attention(label, [change.module.place for change in changes])
    for change in changes:
        for name, tensors in change.module.parameters.items():
            if name != "alpha" and not all(is_finite(tensor) for tensor in tensors):
                raise LoraError(
                    f"LoRA {label} holds NaN or infinite values in {name} of {change.module.name}; "
                    "train or download it again."
                )


def _check_shape(label: str, change: Change, target: Architecture) -> None:
    place, shape = change.module.place, change.form.shape
    expected = expected_shape(target, place)
    if expected != shape:
        needed = f"there it is {_size(expected)}" if expected else "which has no such module"
        raise LoraError(
            f"LoRA {label} changes {change.module.name} as {_size(shape)}, but the model is {target.name}, {needed}; "
            "get a LoRA that was trained on it."
        )


def _check_once(label: str, modules: Iterable[Module]) -> None:
    seen: dict[str, list[Module]] = defaultdict(list)
    for module in modules:
        for other in seen[module.place.weight]:
            if 1 in (module.place.parts, other.place.parts) or module.place.part == other.place.part:
                raise LoraError(
                    f"LoRA {label} changes one weight twice, as {other.name} and as {module.name}; "
                    "it is two LoRAs in one file, save them apart."
                )
        seen[module.place.weight].append(module)


def _check_whole_attention(label: str, places: Iterable[Place]) -> None:
    """Of q, k and v apart, every block must change the same ones: a trainer chooses them for all blocks alike."""
    found: dict[str, dict[str, dict[int, str]]] = {"img_attn": defaultdict(dict), "txt_attn": defaultdict(dict)}
    for place in places:
        if place.parts > 1:
            kind = "img_attn" if "img_attn" in place.weight else "txt_attn"
            found[kind][place.weight][place.part] = place.module
    for weights in found.values():
        whole = set().union(*weights.values())
        for weight, parts in weights.items():
            if set(parts) != whole:
                missing = ", ".join("qkv"[part] for part in sorted(whole - set(parts)))
                raise LoraError(
                    f"LoRA {label} holds only part of q, k and v in {weight.removesuffix('.weight')}: {missing} is "
                    "missing, other blocks have it. The file is incomplete; download or convert it again."
                )


def _update(change: Change, target: Architecture) -> Update:
    place, form, magnitude = change.module.place, change.form, change.magnitude
    if place.weight == ADA_LAYER_NORM and place.layout == "diffusers":
        form = form.swap_halves()
        if magnitude is not None and magnitude.shape[0] > 1:
            magnitude = swap_halves(magnitude)
    length = form.shape[0]
    return Update(place.weight, (place.part * length, length) if place.parts > 1 else None, form, magnitude)


def _size(shape: Sequence[int] | None) -> str:
    return "x".join(map(str, shape or ()))
