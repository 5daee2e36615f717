"""The canonical form of a LoRA: updates, each to one weight in BFL's layout or to a slice of its rows.

A form knows its dense change ``delta()`` (float32 [out, in]), its product with activations ``apply(x)`` (which never
makes the dense change where factors do) and its ``shape``. The products are those of the original LoRA
(arXiv:2106.09685), of LyCORIS for LoKr and LoHa (arXiv:2309.14859), and DoRA (arXiv:2402.09353).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..weights.layout import swap_halves


class LowRank(NamedTuple):
    """``scale · up @ down``; up [out, rank], down [rank, in]."""

    up: Tensor
    down: Tensor
    scale: float

    name = "LoRA"

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
        return self._replace(up=self.up[rows])

    def swap_halves(self) -> LowRank:
        return self._replace(up=swap_halves(self.up))


class LoKr(NamedTuple):
    """``scale · kron(w1, w2)``; each factor is one matrix, or two to be multiplied."""

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    scale: float

    name = "LoKr"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w1[0].shape[0] * self.w2[0].shape[0], self.w1[-1].shape[1] * self.w2[-1].shape[1]

    @property
    def rank(self) -> int | None:
        """Of what is decomposed; None where nothing is."""
        return next((factor[1].shape[0] for factor in (self.w2, self.w1) if len(factor) == 2), None)

    def delta(self) -> Tensor:
        return self.scale * torch.kron(_product(self.w1).float(), _product(self.w2).float())

    def apply(self, x: Tensor) -> Tensor:
        w1 = _product(self.w1)
        inner = x.unflatten(-1, (w1.shape[1], -1))  # [..., in1, in2]
        for factor in reversed(self.w2):
            inner = F.linear(inner, factor)
        return self.scale * F.linear(inner.mT, w1).mT.flatten(-2)

    def take_rows(self, rows: slice) -> Full:
        return Full(self.delta()[rows])

    def swap_halves(self) -> Full:
        return Full(swap_halves(self.delta()))


class LoHa(NamedTuple):
    """``scale · (w1_a @ w1_b) * (w2_a @ w2_b)``, elementwise; a [out, rank], b [rank, in]."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float

    name = "LoHa"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w1_a.shape[0], self.w1_b.shape[1]

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    def delta(self) -> Tensor:
        return self.scale * (self.w1_a.float() @ self.w1_b.float()) * (self.w2_a.float() @ self.w2_b.float())

    def apply(self, x: Tensor) -> Tensor:
        """As a low-rank product of rank² (the Khatri-Rao products of the factors), where that is lower."""
        if self.rank**2 >= min(self.shape):
            return F.linear(x, self.delta().to(x.dtype))
        down = (self.w1_b[:, None] * self.w2_b[None]).flatten(0, 1)
        up = (self.w1_a[:, :, None] * self.w2_a[:, None]).flatten(1)
        return self.scale * F.linear(F.linear(x, down), up)

    def take_rows(self, rows: slice) -> LoHa:
        return self._replace(w1_a=self.w1_a[rows], w2_a=self.w2_a[rows])

    def swap_halves(self) -> LoHa:
        return self._replace(w1_a=swap_halves(self.w1_a), w2_a=swap_halves(self.w2_a))


class Full(NamedTuple):
    """The dense change itself; of a matrix, or of a norm's scale [128]."""

    diff: Tensor

    name = "full difference"
    rank = None

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


Form = LowRank | LoKr | LoHa | Full
FORMS: dict[str, type] = {form.name: form for form in (LowRank, LoKr, LoHa, Full)}


class Update(NamedTuple):
    """One change of one weight.

    ``weight``: BFL's name, ``double_blocks.0.img_attn.qkv.weight``. ``rows``: (start, length) where only these rows
    change. ``magnitude``: of a DoRA, [rows, 1], or [1, columns] of one that scales columns.
    """

    weight: str
    rows: tuple[int, int] | None
    form: Any
    magnitude: Tensor | None = None

    @property
    def scales_columns(self) -> bool:
        """Whether it is a DoRA with a magnitude of each column: then all rows count in its norms."""
        return self.magnitude is not None and self.magnitude.shape[0] == 1

    def within(self, weight: Tensor) -> Tensor:
        """The rows of a tensor of the weight's size that this update changes, as a view."""
        return weight if self.rows is None else weight.narrow(0, *self.rows)

    def change(self, strength: float, weight: Tensor) -> Tensor:
        """What is added to the rows that change; float32.

        For a DoRA it is ``m · V / ‖V‖ - W`` with ``V = W + strength · delta`` and the norm of each row (as peft
        defines it) or column; strength 0 changes nothing (peft would still scale W by ``m / ‖W‖``).

        Args:
            weight: the base weight, without the change of any LoRA. A DoRA alone reads it.
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

    def tensors(self) -> list[Tensor]:
        """Every tensor in it."""
        return list(_tensors(self))

    def to(self, *where: Any) -> Update:
        """The same update with every tensor moved or cast, as `Tensor.to` takes it."""
        return _to(self, where)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, in tuples of any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)


def _to(value: Any, where: tuple[Any, ...]) -> Any:
    """``value`` with every tensor in it, in tuples of any depth, moved."""
    if isinstance(value, Tensor):
        return value.to(*where)
    if isinstance(value, tuple):
        moved = [_to(item, where) for item in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


def _product(factor: tuple[Tensor, ...]) -> Tensor:
    return factor[0] if len(factor) == 1 else factor[0] @ factor[1]
