"""The forms that a change of a weight has in LoRA files, and the update of one weight that is made of it.

A form is one class. It declares the keys that trainers write, how it is made of a module's factors, its shape, and its
mathematics: the dense change ``delta()`` (float32 [out, in]) and its product with activations ``apply(x)``, which does
not make the dense change where factors do. `FORMS` lists them; each host has a table that says what it does with each.

The products are those of the original LoRA (arXiv:2106.09685), of LyCORIS for LoKr and LoHa (arXiv:2309.14859), and of
DoRA (arXiv:2402.09353).
"""

from __future__ import annotations

import dataclasses
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..weights.layout import swap_halves
from .config import AdapterConfig
from .names import UNSUPPORTED, UP_BIAS, Key, Module
from .report import LoraError

# What may stand beside the factors of any form.
COMMON = {
    "alpha": "alpha",
    "scalar": "scalar",  # of LyCORIS: a factor that was trained
    "dora_scale": "magnitude",  # of kohya, OneTrainer and LyCORIS
    "lora_magnitude_vector": "magnitude",  # of peft
    "magnitude": "magnitude",  # of ai-toolkit
    "reshape_weight": "reshape_weight",  # of ComfyUI: the size that the weight gets
}
LARGEST = sys.float_info.max


class Factors:
    """The tensors of one module of FLUX.2, by role. A form takes its factors out; the rest then shows as left over.

    Attributes:
        name: names the module as the file does.
        tensors: hold one tensor of each role.
        strays: hold what follows that name in keys of no known kind.
        alpha: scales the change, once `update` was called; None where nothing scales it.
    """

    def __init__(self, label: str, name: str, module: Module, config: AdapterConfig) -> None:
        self.label, self.name, self.module, self.config = label, name, module, config
        self.tensors: dict[str, Tensor] = {}
        self.strays: list[str] = []
        self.alpha: float | None = None
        self._twice: list[str] = []
        self._splits: dict[str, int] = {}
        self._left: dict[str, Tensor] = {}
        self._given_alpha: float | None = None

    def add(self, key: Key, tensor: Tensor) -> None:
        """Take in one tensor of the module."""
        if key.split is not None:
            self._splits[key.role] = self._splits.get(key.role, 0) + 1
        elif key.role in self.tensors:
            self._twice.append(key.role)
        else:
            self.tensors[key.role] = tensor

    @property
    def unsupported(self) -> dict[str, str]:
        """The roles that no form takes, each with the reason."""
        return {role: UNSUPPORTED[role] for role in self.tensors if role in UNSUPPORTED}

    @property
    def are_missing(self) -> bool:
        """Whether there is nothing but what stands beside factors."""
        return not self.strays and not self._splits and self.tensors.keys() <= {"alpha", "scalar", *UNSUPPORTED}

    def update(self) -> Update:
        """The update that the factors mean, as the module's own layout has it.

        Raises:
            LoraError: factors are missing, given twice, not understood, or do not fit each other; or an alpha that is
                used and is not a finite number.
        """
        self._left = {role: tensor for role, tensor in self.tensors.items() if role not in UNSUPPORTED}
        self._check()
        self._given_alpha = self._number("alpha", most=math.inf) if "alpha" in self._left else self._configured_alpha()
        magnitude = self._left.pop("magnitude", None)
        reshaped = self._left.pop("reshape_weight", None)
        form = self._form()
        if reshaped is not None and reshaped.flatten().tolist() != list(form.shape):
            raise self.error("has a reshape_weight for {} that does not fit its factors")
        if self._left:
            raise self.error(f"changes {{}} in two forms at once, {form.NAME} and {next(iter(self._left))}")
        if magnitude is not None:
            magnitude = self._magnitude(magnitude, form.shape)
        elif self.config.dora and isinstance(form, LowRank):
            raise self.error("says in its config that it is a DoRA, but has no magnitude for {}")
        length = form.shape[0]
        rows = (self.module.part * length, length) if self.module.parts > 1 else None
        return Update(self.module.weight, rows, form, magnitude)

    def has(self, role: str) -> bool:
        """Whether there is a tensor of this role that no form has taken yet."""
        return role in self._left

    def take(self, role: str) -> Tensor:
        """A tensor as it is stored."""
        if role not in self._left:
            raise self.error(f"lacks {role} of {{}}, so it is incomplete")
        return self._left.pop(role)

    def take_matrix(self, role: str) -> Tensor:
        """A tensor as a matrix; trailing axes of length 1, as of a 1x1 convolution, are dropped."""
        tensor = self.take(role)
        if tensor.ndim < 2 or any(length != 1 for length in tensor.shape[2:]) or 0 in tensor.shape:
            raise self.error(f"holds {role} of {{}} in the shape {list(tensor.shape)}, which is not a matrix")
        return tensor.flatten(1) if tensor.ndim > 2 else tensor

    def take_pair(self, left: str, right: str) -> tuple[Tensor, Tensor]:
        """Two matrices whose product exists."""
        a, b = self.take_matrix(left), self.take_matrix(right)
        if a.shape[1] != b.shape[0]:
            raise self.error(f"has factors of different rank for {{}}: {a.shape[1]} and {b.shape[0]}")
        return a, b

    def scale(self, rank: float | None) -> float:
        """The factor of the product: ``alpha / rank``, 1 without alpha, times a trained scalar.

        Args:
            rank: divides alpha; None where the form does not use alpha.
        """
        scale = 1.0
        if rank is not None and self._given_alpha is not None:
            if self._given_alpha == math.inf:
                raise self.error("has no finite number as alpha of {}")
            self.alpha = self._given_alpha
            scale = self.alpha / rank
        return scale * self._number("scalar") if self.has("scalar") else scale

    def configured_rank(self) -> float | None:
        """The rank that peft's config gives the module, which its factors need not show."""
        return self.config.rank_of(self.module.name)

    def error(self, fault: str, remedy: str = "download or convert it again") -> LoraError:
        """An error about this module.

        Args:
            fault: completes the sentence "LoRA FILE ..."; ``{}`` in it becomes the module's name.
            remedy: says what to do.
        """
        return LoraError(f"LoRA {self.label} {fault.replace('{}', self.name)}; {remedy}.")

    def _check(self) -> None:
        if self._splits:
            role, parts = next(iter(self._splits.items()))
            raise self.error(
                f"holds {role} of {{}} split into {parts} parts, as sd-scripts trains q, k and v apart",
                "load it in sd-scripts and save it again, which joins them",
            )
        if self._twice:
            raise self.error(f"gives {self._twice[0]} of {{}} twice")
        if self.strays:
            raise self.error(f"has a parameter {self.strays[0]} of {{}} that is not understood")
        if self.has(UP_BIAS):
            raise self.error("trains a bias (lora_bias) of {}, which klein does not have", "train it without")

    def _form(self) -> Form:
        form = next((form for form in FORMS if self._left.keys() & set(form.KEYS.values())), None)
        if form is None:
            given = " and ".join(role for role in self.tensors if role not in ("alpha", "scalar", *UNSUPPORTED))
            raise self.error(f"has a {given} for {{}} but no factors")
        return form.of(self)

    def _configured_alpha(self) -> float | None:
        return self.config.alpha_of(self.module.name)

    def _number(self, role: str, most: float = LARGEST) -> float:
        """A tensor that is one number.

        An alpha may be infinite where it is not used: ai-toolkit gives whole factors of a LoKr the alpha 9999999999,
        LyCORIS their dimension, and float16 holds neither.
        """
        stored = self._left.pop(role)
        number = float(stored) if stored.numel() == 1 else math.nan
        if not -LARGEST <= number <= most:
            raise self.error(f"has no finite number as {role} of {{}}")
        return number

    def _magnitude(self, stored: Tensor, shape: tuple[int, ...]) -> Tensor:
        """[rows, 1], or of a DoRA that scales columns [1, columns]."""
        magnitude = stored.flatten(1) if stored.ndim > 1 else stored.reshape(-1, 1)
        if len(shape) != 2 or tuple(magnitude.shape) not in ((shape[0], 1), (1, shape[1])):
            raise self.error(f"has a DoRA magnitude of {stored.numel()} for {{}}, which has {shape[0]} rows")
        return magnitude


@dataclass(frozen=True, eq=False)
class Form(ABC):
    """A change of a weight. Its fields are tensors, tuples of tensors, and numbers.

    A new one declares ``NAME``, ``KEYS`` (what trainers write after a module's name -> the role), `of`, `shape` and
    `delta`, and joins `FORMS`. The rest it overrides where its factors allow more than the dense change.
    """

    NAME: ClassVar[str]
    KEYS: ClassVar[Mapping[str, str]]

    @classmethod
    @abstractmethod
    def of(cls, factors: Factors) -> Form:
        """The form that a module's factors make.

        Raises:
            LoraError: factors are missing or do not fit each other.
        """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """[out, in], or [128] of a norm's scale."""

    @property
    def rank(self) -> int | None:
        """The number that divides alpha; None where the form has no rank."""
        return None

    @abstractmethod
    def delta(self) -> Tensor:
        """The dense change, float32 of the form's shape."""

    def apply(self, x: Tensor) -> Tensor:
        """The change times activations: [..., in] to [..., out], in the dtype of x."""
        return F.linear(x, self.delta().to(x.dtype))

    def take_rows(self, rows: slice) -> Form:
        """The same form with only these rows of the change."""
        return Full(self.delta()[rows])

    def swap_halves(self) -> Form:
        """The same change of a weight whose halves of rows are swapped."""
        return Full(swap_halves(self.delta()))

    def fields(self) -> tuple[Any, ...]:
        """The values of the form, in the order in which its class takes them."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Form:
        """The same form with a function applied to each of its tensors."""
        return type(self)(*(_mapped(field, function) for field in self.fields()))


@dataclass(frozen=True, eq=False)
class LowRank(Form):
    """``scale · up @ down``; up [out, rank], down [rank, in].

    kohya and musubi-tuner call the factors ``lora_down.weight`` and ``lora_up.weight``; ai-toolkit, fal, peft,
    diffusers and SimpleTuner ``lora_A.weight`` and ``lora_B.weight``; older diffusers ``lora.down.weight`` and
    ``lora_linear_layer.down.weight``; OneTrainer the first or the second, by the format that was chosen.
    """

    up: Tensor
    down: Tensor
    scale: float

    NAME = "LoRA"
    KEYS: ClassVar = {
        **dict.fromkeys(("lora_A", "lora_down", "lora.down", "lora_linear_layer.down"), "down"),
        **dict.fromkeys(("lora_B", "lora_up", "lora.up", "lora_linear_layer.up"), "up"),
    }

    @classmethod
    def of(cls, factors: Factors) -> LowRank:
        up, down = factors.take_pair("up", "down")
        rank = down.shape[0]
        return cls(up, down, factors.scale(math.sqrt(rank) if factors.config.rslora else rank))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> Tensor:
        return self.scale * (self.up.float() @ self.down.float())

    def apply(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.linear(x, self.down), self.up)

    def take_rows(self, rows: slice) -> LowRank:
        return LowRank(self.up[rows], self.down, self.scale)

    def swap_halves(self) -> LowRank:
        return LowRank(swap_halves(self.up), self.down, self.scale)


@dataclass(frozen=True, eq=False)
class LoKr(Form):
    """``scale · kron(w1, w2)``; each factor is one matrix, or two to be multiplied.

    LyCORIS, and with it SimpleTuner, ai-toolkit, musubi-tuner, OneTrainer and peft write ``lokr_w1``, or ``lokr_w1_a``
    and ``lokr_w1_b``, and the same of w2. Whole factors use no alpha, except in peft.
    """

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    scale: float

    NAME = "LoKr"
    KEYS: ClassVar = {f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}

    @classmethod
    def of(cls, factors: Factors) -> LoKr:
        w1, w2 = (
            (factors.take_matrix(name),) if factors.has(name) else factors.take_pair(f"{name}_a", f"{name}_b")
            for name in ("lokr_w1", "lokr_w2")
        )
        rank: float | None = cls(w1, w2, 1.0).rank
        if factors.config.peft_type == "LOKR":
            if not rank:
                rank = factors.configured_rank()
            if not rank:
                rank = 1
        return cls(w1, w2, factors.scale(rank))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w1[0].shape[0] * self.w2[0].shape[0], self.w1[-1].shape[1] * self.w2[-1].shape[1]

    @property
    def rank(self) -> int | None:
        """The rank of a decomposed factor; None where none is decomposed."""
        return next((factor[1].shape[0] for factor in (self.w2, self.w1) if len(factor) == 2), None)

    def delta(self) -> Tensor:
        return self.scale * torch.kron(_product(self.w1).float(), _product(self.w2).float())

    def apply(self, x: Tensor) -> Tensor:
        w1 = _product(self.w1)
        inner = x.unflatten(-1, (w1.shape[1], -1))  # [..., in1, in2]
        for factor in reversed(self.w2):
            inner = F.linear(inner, factor)
        return self.scale * F.linear(inner.mT, w1).mT.flatten(-2)


@dataclass(frozen=True, eq=False)
class LoHa(Form):
    """``scale · (w1_a @ w1_b) * (w2_a @ w2_b)``, elementwise; a [out, rank], b [rank, in].

    LyCORIS, and with it SimpleTuner, musubi-tuner, OneTrainer and peft write ``hada_w1_a``, ``hada_w1_b``,
    ``hada_w2_a`` and ``hada_w2_b``.
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float

    NAME = "LoHa"
    KEYS: ClassVar = {f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b")}

    @classmethod
    def of(cls, factors: Factors) -> LoHa:
        w1, w2 = (factors.take_pair(f"hada_{name}_a", f"hada_{name}_b") for name in ("w1", "w2"))
        if (w1[0].shape[0], w1[1].shape[1]) != (w2[0].shape[0], w2[1].shape[1]):
            raise factors.error("has factors of different sizes for {}")
        return cls(*w1, *w2, factors.scale(w1[1].shape[0]))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w1_a.shape[0], self.w1_b.shape[1]

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    def delta(self) -> Tensor:
        return self.scale * (self.w1_a.float() @ self.w1_b.float()) * (self.w2_a.float() @ self.w2_b.float())

    def apply(self, x: Tensor) -> Tensor:
        """The change times activations, as a low-rank product of rank² where that is cheaper.

        Its factors are the Khatri-Rao products of the form's own.
        """
        if self.rank**2 >= min(self.shape):
            return F.linear(x, self.delta().to(x.dtype))
        down = (self.w1_b[:, None] * self.w2_b[None]).flatten(0, 1)
        up = (self.w1_a[:, :, None] * self.w2_a[:, None]).flatten(1)
        return self.scale * F.linear(F.linear(x, down), up)

    def take_rows(self, rows: slice) -> LoHa:
        return LoHa(self.w1_a[rows], self.w1_b, self.w2_a[rows], self.w2_b, self.scale)

    def swap_halves(self) -> LoHa:
        return LoHa(swap_halves(self.w1_a), self.w1_b, swap_halves(self.w2_a), self.w2_b, self.scale)


@dataclass(frozen=True, eq=False)
class Full(Form):
    """The dense change itself; of a matrix, or of a norm's scale [128].

    LyCORIS and ai-toolkit write ``diff``, LyCORIS of a norm ``w_norm``.
    """

    diff: Tensor

    NAME = "full difference"
    KEYS: ClassVar = {"diff": "diff", "w_norm": "diff"}

    @classmethod
    def of(cls, factors: Factors) -> Full:
        diff = factors.take("diff")
        if diff.ndim == 0:
            raise factors.error("holds diff of {} as a single number")
        return cls(diff)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.diff.shape)

    def delta(self) -> Tensor:
        return self.diff.float()

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.diff)

    def take_rows(self, rows: slice) -> Full:
        return Full(self.diff[rows])

    def swap_halves(self) -> Full:
        return Full(swap_halves(self.diff))


FORMS: tuple[type[Form], ...] = (LowRank, LoKr, LoHa, Full)


def roles() -> dict[str, str]:
    """The role of every spelling that is read.

    >>> roles()["lora_down"]
    'down'
    """
    return {**COMMON, **{spelling: role for form in FORMS for spelling, role in form.KEYS.items()}}


def form_named(name: str) -> type[Form]:
    """The form of this name.

    >>> form_named("LoRA").__name__
    'LowRank'
    """
    return {form.NAME: form for form in FORMS}[name]


class Update(NamedTuple):
    """One change of one weight.

    Attributes:
        weight: names the weight as BFL does, ``double_blocks.0.img_attn.qkv.weight``.
        rows: (start, length) bound the rows that change; None where all change.
        form: makes the change.
        magnitude: [rows, 1] scales the rows of a DoRA, or [1, columns] its columns; None where it is not a DoRA.
    """

    weight: str
    rows: tuple[int, int] | None
    form: Form
    magnitude: Tensor | None = None

    @property
    def scales_columns(self) -> bool:
        """Whether it is a DoRA with a magnitude of each column: then all rows count in its norms."""
        return self.magnitude is not None and self.magnitude.shape[0] == 1

    def within(self, weight: Tensor) -> Tensor:
        """The rows of a tensor of the weight's size that this update changes, as a view."""
        return weight if self.rows is None else weight.narrow(0, *self.rows)

    def change(self, strength: float, weight: Tensor) -> Tensor:
        """The values to add to the rows that change, float32::

            update.within(weight).add_(update.change(0.8, weight))

        For a DoRA it is ``m · V / ‖V‖ - W`` with ``V = W + strength · delta`` and the norm of each row (as peft
        defines it) or column; strength 0 changes nothing (peft would still scale W by ``m / ‖W‖``).

        Args:
            strength: scales the change; 1 is as trained.
            weight: holds the base weight, without the change of any LoRA. Only a DoRA reads it.
        """
        if strength == 0:
            return torch.zeros(self.form.shape, device=weight.device)
        delta = strength * self.form.delta()
        if self.magnitude is None:
            return delta
        base = self.within(weight).float()
        direction = base + delta
        norm = direction.norm(dim=0 if self.scales_columns else 1, keepdim=True)
        return self.magnitude.float() * direction / norm.clamp_min(torch.finfo(torch.float32).tiny) - base

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Update:
        """The same update with a function applied to each of its tensors."""
        magnitude = self.magnitude if self.magnitude is None else function(self.magnitude)
        return self._replace(form=self.form.mapped(function), magnitude=magnitude)

    def to(self, *where: Any) -> Update:
        """The same update with every tensor moved or cast, as `Tensor.to` takes it."""
        return self.mapped(lambda tensor: tensor.to(*where))

    def tensors(self) -> list[Tensor]:
        """Every tensor in it."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.mapped(note)
        return found


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    return tuple(_mapped(item, function) for item in value) if isinstance(value, tuple) else value


def _product(factor: tuple[Tensor, ...]) -> Tensor:
    return factor[0] if len(factor) == 1 else factor[0] @ factor[1]
