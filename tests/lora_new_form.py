"""A form of LoRA that nobody has, written as CONTRIBUTING.md says; both hosts' tests add it to the package."""

from dataclasses import dataclass
from typing import ClassVar

import torch

NAMES = ("rank_one_rows", "rank_one_columns")


def new_form(forms):
    """The class, for the ``lora.forms`` of a package of any name."""

    @dataclass(frozen=True, eq=False)
    class RankOne(forms.Form):
        """``scale · rows ⊗ columns``; rows [out], columns [in]."""

        rows: torch.Tensor
        columns: torch.Tensor
        scale: float

        NAME = "rank one"
        KEYS: ClassVar = {name: name for name in NAMES}

        @classmethod
        def of(cls, factors):
            return cls(*map(factors.take, NAMES), factors.scale(1))

        @property
        def shape(self):
            return len(self.rows), len(self.columns)

        def delta(self):
            return self.scale * torch.outer(self.rows, self.columns).float()

    return RankOne


def as_patch(form):
    """What ComfyUI gets of it."""
    return ("diff", (form.delta(),))
