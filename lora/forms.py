"""The parameters of one module to the change that they mean: which form it has, and its factor."""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

from torch import Tensor

from .config import AdapterConfig
from .errors import LoraError
from .names import UNSUPPORTED, UP_BIAS, Place
from .updates import Form, Full, LoHa, LoKr, LowRank

LARGEST = sys.float_info.max


class Module(NamedTuple):
    """What a file holds for one module of FLUX.2, by role.

    ``name``: as the file calls it, without the role. ``strays``: what follows that name in keys of no known kind.
    ``splits``: of each factor that is stored in parts, how many they are.
    """

    name: str
    place: Place
    parameters: dict[str, list[Tensor]]
    strays: list[str]
    splits: dict[str, int]


class Change(NamedTuple):
    """What a module means, in its own layout. ``alpha``: None where none is given, then the factor is 1."""

    module: Module
    form: Form
    magnitude: Tensor | None
    alpha: float | None


def change_of(label: str, module: Module, config: AdapterConfig) -> Change:
    """The change that a module's factors mean.

    Raises:
        LoraError: factors that are missing, given twice, or do not fit each other; an alpha that is used and no finite
            number.
    """
    return _Builder(label, module, config).change()


class _Builder:
    """One module's factors, each taken out once, so that what is left over shows."""

    def __init__(self, label: str, module: Module, config: AdapterConfig) -> None:
        self.label, self.module, self.config = label, module, config
        self.left = {role: tensors[0] for role, tensors in module.parameters.items()}
        if module.splits:
            role, parts = next(iter(module.splits.items()))
            raise self.error(
                f"holds {role} of {{}} split into {parts} parts, as sd-scripts trains q, k and v apart",
                "load it in sd-scripts and save it again, which joins them",
            )
        twice = [role for role, tensors in module.parameters.items() if len(tensors) > 1]
        if twice:
            raise self.error(f"gives {twice[0]} of {{}} twice")

    def error(self, fault: str, remedy: str = "download or convert it again") -> LoraError:
        """``fault`` in a sentence; its ``{}`` is the module's name."""
        return LoraError(f"LoRA {self.label} {fault.replace('{}', self.module.name)}; {remedy}.")

    def change(self) -> Change:
        if self.module.strays:
            raise self.error(f"has a parameter {self.module.strays[0]} of {{}} that is not understood")
        if UP_BIAS in self.left:
            raise self.error("trains a bias (lora_bias) of {}, which klein does not have", "train it without")
        alpha = self._alpha()
        magnitude = self.left.pop("magnitude", None)
        reshaped = self.left.pop("reshape_weight", None)
        roles = set(self.left)
        if roles & {"up", "down"}:
            form: Form = self._low_rank(alpha)
        elif any(role.startswith("lokr_") for role in roles):
            form = self._lokr(alpha)
        elif any(role.startswith("hada_") for role in roles):
            form = self._loha(alpha)
        elif "diff" in roles:
            form = Full(self.left.pop("diff"))
        else:
            given = " and ".join(name for name in self.module.parameters if name not in ("alpha", "scalar"))
            raise self.error(f"has a {given} for {{}} but no factors")
        if reshaped is not None and reshaped.flatten().tolist() != list(form.shape):
            raise self.error("has a reshape_weight for {} that does not fit its factors")
        if "scalar" in self.left and not isinstance(form, Full):  # LyCORIS: a factor that was trained
            form = form._replace(scale=form.scale * self._number("scalar"))
        rest = [role for role in self.left if role not in UNSUPPORTED]
        if rest:
            raise self.error(f"changes {{}} in two forms at once, {form.name} and {rest[0]}")
        if form.rank is None and self.config.peft_type != "LOKR":
            alpha = None  # which scales no whole factors
        if magnitude is not None:
            magnitude = self._magnitude(magnitude, form.shape)
        elif self.config.dora and isinstance(form, LowRank):
            raise self.error("says in its config that it is a DoRA, but has no magnitude for {}")
        return Change(self.module, form, magnitude, alpha)

    def _magnitude(self, stored: Tensor, shape: tuple[int, ...]) -> Tensor:
        """[rows, 1], or of a DoRA that scales columns [1, columns]."""
        magnitude = stored.flatten(1) if stored.ndim > 1 else stored.reshape(-1, 1)
        if len(shape) != 2 or tuple(magnitude.shape) not in ((shape[0], 1), (1, shape[1])):
            raise self.error(f"has a DoRA magnitude of {stored.numel()} for {{}}, which has {shape[0]} rows")
        return magnitude

    def _alpha(self) -> float | None:
        """The alpha of the module, or of the config. It may be infinite where it is not used: ai-toolkit gives whole
        factors of a LoKr the alpha 9999999999, LyCORIS their dimension, and float16 holds neither."""
        if "alpha" not in self.left:
            return self.config.alpha_of(self.module.place.module)
        return self._number("alpha", most=math.inf)

    def _number(self, role: str, most: float = LARGEST) -> float:
        stored = self.left.pop(role)
        if stored.numel() != 1 or not -LARGEST <= (number := float(stored)) <= most:
            raise self.error(f"has as {role} of {{}} no finite number")
        return number

    def _scale(self, alpha: float | None, rank: float) -> float:
        if alpha == math.inf:
            raise self.error("has as alpha of {} no finite number")
        return 1.0 if alpha is None else alpha / rank

    def _factor(self, role: str) -> Tensor:
        """A factor as a matrix; trailing axes of length 1, as of a 1x1 convolution, are dropped."""
        if role not in self.left:
            raise self.error(f"lacks {role} of {{}}, so it is incomplete")
        tensor = self.left.pop(role)
        if tensor.ndim < 2 or any(length != 1 for length in tensor.shape[2:]) or 0 in tensor.shape:
            raise self.error(f"holds {role} of {{}} in the shape {list(tensor.shape)}, which is no matrix")
        return tensor.flatten(1) if tensor.ndim > 2 else tensor

    def _pair(self, left: str, right: str) -> tuple[Tensor, Tensor]:
        """Two factors whose product exists."""
        a, b = self._factor(left), self._factor(right)
        if a.shape[1] != b.shape[0]:
            raise self.error(f"has factors of different rank for {{}}: {a.shape[1]} and {b.shape[0]}")
        return a, b

    def _low_rank(self, alpha: float | None) -> LowRank:
        up, down = self._pair("up", "down")
        rank = down.shape[0]
        return LowRank(up, down, self._scale(alpha, math.sqrt(rank) if self.config.rslora else rank))

    def _lokr(self, alpha: float | None) -> LoKr:
        w1, w2 = (
            (self._factor(name),) if name in self.left else self._pair(f"{name}_a", f"{name}_b")
            for name in ("lokr_w1", "lokr_w2")
        )
        form = LoKr(w1, w2, 1.0)
        if self.config.peft_type == "LOKR":  # peft scales whole factors too
            rank = form.rank or self.config.rank_of(self.module.place.module) or 1
            return form._replace(scale=self._scale(alpha, rank))
        return form._replace(scale=self._scale(alpha, form.rank)) if form.rank else form

    def _loha(self, alpha: float | None) -> LoHa:
        w1, w2 = self._pair("hada_w1_a", "hada_w1_b"), self._pair("hada_w2_a", "hada_w2_b")
        form = LoHa(*w1, *w2, 1.0)
        if (w2[0].shape[0], w2[1].shape[1]) != form.shape:
            raise self.error("has factors of different sizes for {}")
        return form._replace(scale=self._scale(alpha, form.rank))
