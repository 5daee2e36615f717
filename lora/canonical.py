"""Any LoRA file to its canonical form: updates of single weights, and a report of what became of every key."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ..weights.architecture import ARCHITECTURES, FLUX_1_WIDTHS, TINY, Architecture
from ..weights.layout import ADA_LAYER_NORM, swap_halves
from .forms import Factors, Update, roles
from .names import FLUX_1, MAX_KEY, NO_BIAS, OTHER_KINDS, TEXT_ENCODER, Key, Module, locate, parse
from .read import LoraFile, is_finite
from .report import LoraError, Report, printable, span, training, trigger_words

NOT_FOR_TEXT = "a text encoder's weight; a klein LoRA changes only the transformer"
LAYOUTS = {"bfl": "BFL names", "diffusers": "diffusers names"}
UNKNOWN = "unknown"
FLUX_1_NAME = "FLUX.1"
FLUX_1_BLOCKS = (19, 38)  # double, single
FLUX_1_SIZES = {  # (rows, columns) in hidden widths
    "_attn.qkv.": (3, 1), "_attn.proj.": (1, 1), "_mlp.0.": (4, 1), "_mlp.2.": (1, 4), ".linear1.": (7, 1),
    ".linear2.": (1, 5),
}  # fmt: skip
LeftOut = dict[str, str]  # module or key -> why
Change = tuple[Factors, Update]  # what the file holds for a module, and what it means


@dataclass(frozen=True, eq=False)
class Lora:
    """A file in canonical form.

    Attributes:
        updates: of the model's weights, in Black Forest Labs' layout, on the CPU. There are none where
            ``report.problem`` says why the file cannot be used.
        report: what the file is, and what of it applies.
    """

    updates: tuple[Update, ...]
    report: Report

    @property
    def size(self) -> int:
        """Bytes of its tensors in memory."""
        storages = [tensor.untyped_storage() for update in self.updates for tensor in update.tensors()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())  # q, k and v may share


def canonical(file: LoraFile, target: Architecture) -> Lora:
    """The updates of ``target``'s weights that a file means, exactly::

        canonical(read_lora(find_weights("style.safetensors")), KLEIN_9B).report.applied

    A file that cannot be used becomes a report with a ``problem``; nothing is raised. The report also lists what is
    left out: what klein does not have (a text encoder in the LoRA's reach, biases, unknown modules), and kinds of LoRA
    that are not supported.

    Args:
        file: holds the tensors, the metadata and the config.
        target: says which modules the model has, and their shapes.
    """
    known = roles()
    keys = {name: parse(name, known) for name in file.keys}
    found, left_out, text = _sorted_keys(file, keys)
    report = Report(
        file.label,
        total=len(found) + len(left_out),
        trigger_words=trigger_words(file.metadata),
        training=training(file.metadata),
        note=file.note,
    )
    try:
        _check_adapters(file.label, {key.adapter for key in keys.values() if key and key.adapter})
        changes: list[Change] = []
        for factors in found:
            unusable = _unusable(factors)
            left_out |= unusable
            if factors.name not in unusable:
                changes.append((factors, factors.update()))
    except LoraError as error:
        return Lora((), replace(report, left_out=(*left_out.items(), *text.items()), problem=str(error)))
    report = replace(
        report,
        left_out=(*left_out.items(), *text.items()),
        format=_format(changes),
        base=_base(target, changes, left_out),
        rank=span(update.form.rank for _, update in changes if update.form.rank is not None),
        alpha=span(factors.alpha for factors, _ in changes if factors.alpha is not None),
    )
    try:
        _check(file.label, changes, report, target)
    except LoraError as error:
        return Lora((), replace(report, problem=str(error)))
    return Lora(tuple(_in_bfl_order(*change) for change in changes), replace(report, applied=len(changes)))


def _sorted_keys(file: LoraFile, keys: Mapping[str, Key | None]) -> tuple[list[Factors], LeftOut, LeftOut]:
    """What a file holds for each module of FLUX.2, what belongs to no module, and what belongs to a text encoder."""
    found: dict[str, Factors] = {}
    left_out: LeftOut = {}
    text: LeftOut = {}
    strays = []
    for name, key in keys.items():
        module = locate(key.module) if key else None
        if key and module:
            if key.module not in found:
                found[key.module] = Factors(file.label, key.module, module, file.config)
            found[key.module].add(key, file.tensors[name])
        elif TEXT_ENCODER.search((key.module if key else name)[:MAX_KEY]):
            text[printable(key.module if key else name)] = NOT_FOR_TEXT
        elif key:
            left_out[printable(key.module)] = OTHER_KINDS.get(key.role, "FLUX.2 has no such module")
        else:
            strays.append(name)
    for name in strays:
        owner = _owner(name, found)
        if owner:
            found[owner].strays.append(printable(name[len(owner) + 1 :]))
        else:
            left_out[printable(name)] = "no parameter of a known kind of LoRA"
    return list(found.values()), left_out, text


def _owner(key: str, names: Collection[str]) -> str | None:
    """The module that a key of no known kind belongs to, if the file changes it."""
    words = key[:MAX_KEY].split(".")
    candidates = (".".join(words[:count]) for count in range(len(words) - 1, 0, -1))
    return next((name for name in candidates if name in names), None)


def _check_adapters(label: str, adapters: Collection[str]) -> None:
    if len(adapters) > 1:
        names = ", ".join(sorted(map(printable, adapters))[:5])
        raise LoraError(f"LoRA {label} holds several adapters ({names}); save the one that you want by itself.")


def _unusable(factors: Factors) -> LeftOut:
    """Why a module, or a bias beside it, is left out; empty where all of it is used."""
    whole = next((why for why in factors.unsupported.values() if why != NO_BIAS), None)
    if whole:
        return {factors.name: whole}
    if factors.are_missing:
        return {factors.name: NO_BIAS if factors.unsupported else "an alpha without factors"}
    return {f"{factors.name}.{role}": why for role, why in factors.unsupported.items()}


def _format(changes: Sequence[Change]) -> str:
    """``LoRA, diffusers names after 'transformer.'``"""
    if not changes:
        return UNKNOWN
    kinds = [one.form.NAME if one.magnitude is None else f"{one.form.NAME} with DoRA" for _, one in changes]
    modules = [factors.module for factors, _ in changes]
    names = [f"{LAYOUTS[one.layout]} after {one.prefix!r}" if one.prefix else LAYOUTS[one.layout] for one in modules]
    return f"{' and '.join(dict.fromkeys(kinds))}, {' and '.join(list(dict.fromkeys(names))[:3])}"


@lru_cache(8)
def _shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    return architecture.shapes()


def _expected_shape(architecture: Architecture, module: Module) -> tuple[int, ...] | None:
    """The shape of the change of a module; None where the architecture has no such weight."""
    shape = _shapes(architecture).get(module.weight)
    return (shape[0] // module.parts, *shape[1:]) if shape else None


def _base(target: Architecture, changes: Sequence[Change], left_out: Iterable[str]) -> str:
    """The base model in words, told from the modules and their shapes: the target's name, another's, or ``unknown``."""
    if any(FLUX_1.search(name) for name in left_out):
        return FLUX_1_NAME
    if not changes:
        return UNKNOWN
    shaped = [(factors.module, update.form.shape) for factors, update in changes]
    candidates = dict.fromkeys((target, *ARCHITECTURES, TINY))
    fitting = [one for one in candidates if all(_expected_shape(one, module) == shape for module, shape in shaped)]
    if target in fitting:
        return target.name
    names = [one.name for one in fitting]
    if all(_fits_flux_1(module, shape) for module, shape in shaped):
        names.append(FLUX_1_NAME)
    return " or ".join(names) or UNKNOWN


def _fits_flux_1(module: Module, shape: tuple[int, ...]) -> bool:
    """Whether FLUX.1 has this module in this shape: as wide as klein 4B, with another MLP and more blocks."""
    out, into = next((sizes for part, sizes in FLUX_1_SIZES.items() if part in module.weight), (0, 0))
    block = int(module.weight.split(".")[1]) if out else 0
    double, single = FLUX_1_BLOCKS
    blocks = single if module.weight.startswith("single_blocks.") else double
    return shape == (out * FLUX_1_WIDTHS[0] // module.parts, into * FLUX_1_WIDTHS[0]) and block < blocks


def _check(label: str, changes: Sequence[Change], report: Report, target: Architecture) -> None:
    """Refuse what would apply in part, wrongly, or not at all."""
    if report.base not in (target.name, UNKNOWN):
        raise LoraError(
            f"LoRA {label} was made for {report.base}, the model is {target.name}; get a LoRA that was trained on it."
        )
    if not changes:
        kinds = dict.fromkeys(why for _, why in report.left_out)
        raise LoraError(
            f"LoRA {label} holds nothing that applies to {target.name} ({'; '.join(kinds)}); get one trained on it."
        )
    for factors, update in changes:
        _check_shape(label, factors, update.form.shape, target)
    _check_once(label, [factors for factors, _ in changes])
    _check_whole_attention(label, [factors.module for factors, _ in changes])
    for factors, _ in changes:
        for role, tensor in factors.tensors.items():
            if role != "alpha" and not is_finite(tensor):  # an alpha that is used was checked
                raise LoraError(
                    f"LoRA {label} holds NaN or infinite values in {role} of {factors.name}; "
                    "train or download it again."
                )


def _check_shape(label: str, factors: Factors, shape: tuple[int, ...], target: Architecture) -> None:
    expected = _expected_shape(target, factors.module)
    if expected != shape:
        needed = f"there it is {_size(expected)}" if expected else "which has no such module"
        raise LoraError(
            f"LoRA {label} changes {factors.name} as {_size(shape)}, but the model is {target.name}, {needed}; "
            "get a LoRA that was trained on it."
        )


def _check_once(label: str, found: Iterable[Factors]) -> None:
    seen: dict[str, list[Factors]] = defaultdict(list)
    for factors in found:
        module = factors.module
        for other in seen[module.weight]:
            if 1 in (module.parts, other.module.parts) or module.part == other.module.part:
                raise LoraError(
                    f"LoRA {label} changes one weight twice, as {other.name} and as {factors.name}; "
                    "it is two LoRAs in one file, save them apart."
                )
        seen[module.weight].append(factors)


def _check_whole_attention(label: str, modules: Iterable[Module]) -> None:
    """Where q, k and v are separate, every block must change the same ones: a trainer chooses them for all blocks."""
    found: dict[str, dict[str, set[int]]] = {"img_attn": defaultdict(set), "txt_attn": defaultdict(set)}
    for module in modules:
        if module.parts > 1:
            stream = "img_attn" if "img_attn" in module.weight else "txt_attn"
            found[stream][module.weight].add(module.part)
    for weights in found.values():
        whole = {part for parts in weights.values() for part in parts}
        for weight, parts in weights.items():
            if parts != whole:
                missing = ", ".join("qkv"[part] for part in sorted(whole - parts))
                raise LoraError(
                    f"LoRA {label} holds only part of q, k and v in {weight.removesuffix('.weight')}: {missing} is "
                    "missing, other blocks have it. The file is incomplete; download or convert it again."
                )


def _in_bfl_order(factors: Factors, update: Update) -> Update:
    """The same update with its rows in BFL's order, which diffusers turns around in one module."""
    if update.weight != ADA_LAYER_NORM or factors.module.layout == "bfl":
        return update
    magnitude = update.magnitude
    if magnitude is not None and not update.scales_columns:
        magnitude = swap_halves(magnitude)
    return update._replace(form=update.form.swap_halves(), magnitude=magnitude)


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
