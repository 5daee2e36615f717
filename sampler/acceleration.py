"""Acceleration: fewer calls of the model, by one plan that is known before the run.

A guided step calls the model twice, for the conditional and the unconditional x0, whose difference times the guidance
scale is what guidance does. Along a run that difference, and x0 itself, move smoothly in ``λ = log((1-σ)/σ)``. So
where steps lie close in λ, every second one can take it from a straight line through the last two that were computed
instead of from the model. x0 is extrapolated, never a velocity, which holds the noise of its own step: with injected
noise only x0 stays right. Below some sigma guidance decides nothing more and is left out; at the highest sigmas, where
it decides the picture, never. ``docs/acceleration.md`` has what each level costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from torch import Tensor

from .params import LEVELS
from .sigmas import as_numbers, checked_sigmas, log_snr
from .solvers import DEFAULT_SOLVER, find_solver

FEWEST = 20  # steps; with fewer, each decides too much, and all are computed in full
REACH = 0.45  # in λ: how far from the step before another may lie that is not computed; half with a multistep solver
STRETCH = 2.0  # how far a line through two points may be continued, relative to their distance
HIGHEST = 0.97  # sigma: a run that starts below it keeps its guidance to the end, since all of it is decided there
SETTLED = 0.82  # sigma: below it guidance changes slowly, and is reused more often
LAST = 0.5  # sigma: below it guidance is left out, and what x0 misses would not be made good any more
ACCELERATION_HELP = (
    "Fewer calls of the model, by a plan that is shown with the run: 'none' is exact, 'regular' reuses guidance at "
    "every second step and leaves it out at the end, 'high' also extrapolates the prediction at every second step. "
    "With few steps they do less, below 20 nothing."
)


class Rule(NamedTuple):
    """How often a level reuses guidance: so many times in turn, then it is computed again."""

    extrapolates: bool  # x0, at every second step
    before: int  # times in turn at sigmas of `SETTLED` and above
    after: int  # and below


RULES = {"regular": Rule(False, 1, 3), "high": Rule(True, 0, 1)}


class Action(Enum):
    """What is done at a step."""

    COMPUTED = "computed"  # two calls, one without guidance
    REUSED = "reused"  # one call; the difference that guidance multiplies is extrapolated
    UNGUIDED = "unguided"  # one call; guidance is left out
    EXTRAPOLATED = "extrapolated"  # no call; x0 is extrapolated


@dataclass(frozen=True)
class Plan:
    """What is done at each step of a run."""

    level: str
    guided: bool  # whether a computed step takes two calls
    sigmas: tuple[float, ...]  # [steps + 1]
    actions: tuple[Action, ...]

    @property
    def calls(self) -> int:
        """Calls of the model in the whole run, for each picture."""
        costs = {Action.COMPUTED: 2 if self.guided else 1, Action.EXTRAPOLATED: 0}
        return sum(costs.get(action, 1) for action in self.actions)

    @property
    def sentence(self) -> str:
        """What a user reads of it before the run; empty for ``none``."""
        if self.level == "none" or not self.actions:
            return ""
        steps = len(self.actions)
        reused, unguided, extrapolated = (
            self.actions.count(action) for action in (Action.REUSED, Action.UNGUIDED, Action.EXTRAPOLATED)
        )
        guidance = [f"reused at {reused}"] if reused else []
        if unguided:
            guidance.append(f"left out at the last {unguided}")
        does = [f"guidance is {' and '.join(guidance)}"] if guidance else []
        if extrapolated:
            does.append(f"the prediction is extrapolated at {extrapolated}")
        parts = [f"of {steps} steps {', '.join(does)}"] if does else []
        if self.level == "regular" and not self.guided:
            parts.append("without guidance there is none to reuse")
        elif not reused and not extrapolated:
            parts.append("the steps lie too far apart to reuse anything")
        calls = steps * (2 if self.guided else 1)
        return f"acceleration {self.level}: {self.calls} of {calls} model calls; {'; '.join(parts)}."


def plan(level: str, sigmas: Tensor | Sequence[float], guidance_scale: float, solver: str = DEFAULT_SOLVER) -> Plan:
    """What a level does over a schedule. Nothing else decides: neither the model's outputs nor the noise.

    ``plan("regular", sigmas, 5.0).calls``

    Args:
        level: ``none``, ``regular`` or ``high``.
        sigmas: [steps + 1], falling, in [0, 1].
        guidance_scale: 1 is no guidance.
        solver: a name in `SOLVERS`. A multistep solver extrapolates x0 itself, which lengthens every error, so that
            only steps of half the distance are left out.

    Raises:
        ValueError: an unknown level or solver; with a level other than ``none``, sigmas that are not of flow matching.
    """
    if level not in LEVELS:
        raise ValueError(f"acceleration is {level!r}; allowed are {', '.join(LEVELS)}.")
    guided = guidance_scale != 1
    steps = max(len(sigmas) - 1, 0)
    if level == "none" or steps == 0:
        return Plan(level, guided, tuple(as_numbers(sigmas)), (Action.COMPUTED,) * steps)
    rule = RULES[level]
    reach = REACH if find_solver(solver).plain else REACH / 2
    values = checked_sigmas(sigmas, "acceleration")
    if steps < FEWEST:
        return Plan(level, guided, tuple(values), (Action.COMPUTED,) * steps)
    actions: list[Action] = []
    for i, sigma in enumerate(values[:-1]):
        near = i > 0 and _gap(values[i - 1], sigma) <= reach
        turns = rule.before if sigma >= SETTLED else rule.after
        if (
            rule.extrapolates
            and near
            and sigma >= LAST
            and actions[-1] is not Action.EXTRAPOLATED
            and _line_reaches(values, actions, {Action.COMPUTED, Action.REUSED, Action.UNGUIDED})
        ):
            actions.append(Action.EXTRAPOLATED)
        elif guided and sigma < LAST and values[0] > HIGHEST:
            actions.append(Action.UNGUIDED)
        elif guided and near and _line_reaches(values, actions, {Action.COMPUTED}) and _reused_in_turn(actions) < turns:
            actions.append(Action.REUSED)
        else:
            actions.append(Action.COMPUTED)
    return Plan(level, guided, tuple(values), tuple(actions))


class Accelerator:
    """Carries a plan out over one run of a batch; both hosts' loops ask it at every step."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._step = 0
        self._x0, self._difference = _Line(), _Line()

    def x0(self, step: int, compute: Callable[[], Tensor]) -> Tensor:
        """The guided x0 of a step: by the model, or from those of the steps before.

        Args:
            step: 0 to steps - 1, in order.
            compute: asks the model for it; within, the guided prediction is made with `unconditional`.
        """
        self._step = step
        if self.plan.actions[step] is Action.EXTRAPOLATED:
            return self._x0.at(self._lam)
        x0 = compute()
        self._x0.add(self._lam, x0)
        return x0

    @property
    def needs_unconditional(self) -> bool:
        """Whether `unconditional` will ask for the prediction, at the step that `x0` is at."""
        return self.plan.actions[self._step] is Action.COMPUTED

    def unconditional(self, conditional: Tensor, compute: Callable[[], Tensor], scale: float | Tensor = 1.0) -> Tensor:
        """The unconditional prediction at the step that `x0` is at, from the conditional one.

        Args:
            conditional: x0, or what is linear in it as a velocity is.
            compute: asks the model for the unconditional prediction, of the same kind.
            scale: what makes a difference of these predictions one of x0: -σ for velocities.
        """
        action = self.plan.actions[self._step]
        if action is Action.UNGUIDED:
            return conditional
        if action is Action.REUSED:
            return conditional - self._difference.at(self._lam) / scale
        unconditional = compute()
        self._difference.add(self._lam, (conditional - unconditional) * scale)
        return unconditional

    @property
    def _lam(self) -> float:
        sigma = self.plan.sigmas[self._step]
        return log_snr(sigma) if 0 < sigma < 1 else -math.inf


class _Line:
    """The straight line in λ through the last two values added at different, finite λ."""

    def __init__(self) -> None:
        self._points: list[tuple[float, Tensor]] = []

    def add(self, lam: float, value: Tensor) -> None:
        if math.isfinite(lam):
            others = [point for point in self._points if point[0] < lam]
            self._points = [*others[-1:], (lam, value)]

    def at(self, lam: float) -> Tensor:
        (lam_before, before), (lam_last, last) = self._points
        return last + (lam - lam_last) / (lam_last - lam_before) * (last - before)


def _gap(sigma_before: float, sigma: float) -> float:
    """The distance of two sigmas in λ, infinite from σ = 1."""
    return log_snr(sigma) - log_snr(sigma_before) if sigma > 0 and sigma_before < 1 else math.inf


def _line_reaches(sigmas: Sequence[float], actions: Sequence[Action], known: set[Action]) -> bool:
    """Whether the line through the last two sigmas of the actions ``known`` reaches the step after ``actions``."""
    known_sigmas = {sigma for sigma, action in zip(sigmas, actions, strict=False) if action in known and sigma < 1}
    points = sorted(known_sigmas, reverse=True)
    return len(points) >= 2 and _gap(points[-1], sigmas[len(actions)]) <= STRETCH * _gap(points[-2], points[-1])


def _reused_in_turn(actions: Sequence[Action]) -> int:
    """How often guidance was reused since it was last computed."""
    since = list(reversed(actions)).index(Action.COMPUTED)
    return actions[len(actions) - since :].count(Action.REUSED)
