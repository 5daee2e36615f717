"""The report of what a LoRA is and how much of it applies, and the error of this package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

LISTED = 12  # modules left out that the text names; the API names more
MAX_LISTED = 100
MAX_TEXT = 200  # characters of a metadata value
TRIGGER_KEYS = (
    "modelspec.trigger_phrase", "trigger_phrase", "trigger_word", "trigger_words", "trigger", "trained_words",
    "activation text", "instance_prompt", "ss_trigger_words",
)  # fmt: skip


class LoraError(ValueError):
    """A LoRA that cannot be used, or a request for one; the only error of this package.

    Its sentence names the file, what is wrong and what to do.
    """


@dataclass(frozen=True)
class Report:
    """One LoRA, for a node, the API and the command line.

    Usage: ``print(load_lora("style.safetensors", KLEIN_9B).report)``.

    Attributes:
        file: names the file, with its folder's name where its own says nothing.
        format: says in words which forms and names the file holds.
        base: names the model that it was made for, or is ``unknown``.
        rank, alpha: give the range in words (``32``, ``8 to 64``, ``none``).
        applied, total: count modules.
        left_out: holds (module or key, why) for everything that does not apply.
        trigger_words, training: hold what the trainer wrote into the metadata.
        note: says what the reader left aside.
        problem: says why the file cannot be used; empty where it can.
        strength, how: say with which strength and in which way it was put on a model; None and empty before.
    """

    file: str
    format: str = "unknown"
    base: str = "unknown"
    rank: str = "none"
    alpha: str = "none"
    applied: int = 0
    total: int = 0
    left_out: tuple[tuple[str, str], ...] = ()
    trigger_words: str = ""
    training: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    problem: str = ""
    strength: float | None = None
    how: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it; of the modules left out the first hundred, and how many there are."""
        listed = [{"module": module, "why": why} for module, why in self.left_out[:MAX_LISTED]]
        return {**asdict(self), "left_out": listed, "left_out_count": len(self.left_out)}

    def __str__(self) -> str:
        strength = f" at {self.strength:g}" if self.strength is not None else ""
        lines = [
            f"{self.file}{strength}: {self.applied} of {self.total} modules apply{f', {self.how}' if self.how else ''}",
            f"  format: {self.format}; rank {self.rank}, alpha {self.alpha}",
            f"  made for: {self.base}",
        ]
        for module, why in self.left_out[:LISTED]:
            lines.append(f"  left out: {module} ({why})")
        if len(self.left_out) > LISTED:
            lines.append(f"  left out: {len(self.left_out) - LISTED} more")
        if self.trigger_words:
            lines.append(f"  trigger words: {self.trigger_words}")
        lines += [f"  {name}: {value}" for name, value in self.training.items()]
        if self.note:
            lines.append(f"  note: {self.note}")
        return "\n".join(lines)


def trigger_words(metadata: Mapping[str, str]) -> str:
    """The trigger words that a trainer wrote into the metadata of a file; empty where there are none."""
    return next((printable(metadata[name]) for name in TRIGGER_KEYS if metadata.get(name)), "")


def training(metadata: Mapping[str, str]) -> dict[str, str]:
    """The other settings of the training in the metadata, each value cut short."""
    rest = [(name, value) for name, value in sorted(metadata.items()) if name not in TRIGGER_KEYS and name != "format"]
    shown = {printable(name): printable(value) for name, value in rest[:MAX_LISTED]}
    return {**shown, "more metadata": f"{len(rest) - MAX_LISTED} entries"} if len(rest) > MAX_LISTED else shown


def printable(text: str, most: int = MAX_TEXT) -> str:
    """A text as one line of visible characters, cut to ``most`` characters."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text[:most])
    return f"{plain}..." if len(text) > most else plain


def span(numbers: Iterable[float]) -> str:
    """The range of numbers in words: ``32``, ``8 to 64`` or ``none``.

    >>> span([64, 8])
    '8 to 64'
    """
    found = sorted(set(numbers))
    if not found:
        return "none"
    return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"
