"""Measured spectra side by side: the differences, a table, and a plot that is drawn by Pillow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from ..sampler.measure import decibels, wavelength

SIZE = (1024, 1024)  # pixels of the plot
SMOOTH = 2  # drawn so many times larger, and reduced: Pillow's lines have hard edges
FONT, SMALL = 32, 28  # pixels; a node shows the plot at about a third of its size
LEFT, RIGHT, TOP, BOTTOM, GAP = 130, 36, 24, 104, 76  # pixels around and between the panels
ROW = 46  # pixels of a line of the legend
DECADES = 12  # of power that are shown below the largest
# Okabe and Ito's colours, which people tell apart however they see colours
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, GRID, PAPER = "#222222", "#DDDDDD", "#FFFFFF"


class Curve(NamedTuple):
    """The spectrum of one input.

    Args:
        name: names the input's socket, in Latin letters.
        label: is what the user calls it.
        kind: says what its power counts, so that unlike things are not compared: "picture" or "latent".
        power: by half octave, from `half_octave_spectrum`.
    """

    name: str
    label: str
    kind: str
    power: dict[int, float]


def differences(curves: Sequence[Curve]) -> list[dict[int, float] | None]:
    """dB of each curve against the first of its kind, by half octave that both have; None for that first.

    >>> differences([Curve("a", "a", "picture", {2: 1.0}), Curve("b", "b", "picture", {2: 10.0})])
    [None, {2: 10.0}]
    """
    found: list[dict[int, float] | None] = []
    for curve in curves:
        first = next(one for one in curves if one.kind == curve.kind)
        shared = [k for k in curve.power if k in first.power]
        found.append(None if first is curve else {k: decibels(curve.power[k], first.power[k]) for k in shared})
    return found


def as_table(curves: Sequence[Curve]) -> str:
    """Lines of values between tabs, coarse to fine: wavelength in pixels, power of each curve, dB of each but a first.

    >>> print(as_table([Curve("a", "a", "picture", {2: 0.5})]).replace("\\t", " | "))
    wavelength in pixels | power of a
    2 | 0.5
    """
    compared = [
        (curve, dB, next(one for one in curves if one.kind == curve.kind))
        for curve, dB in zip(curves, differences(curves), strict=True)
        if dB is not None
    ]
    header = [
        "wavelength in pixels",
        *(f"power of {curve.label}" for curve in curves),
        *(f"dB of {curve.label} against {first.label}" for curve, _, first in compared),
    ]
    rows = [
        [
            f"{wavelength(k):.4g}",
            *(_number(curve.power.get(k), "{:.6g}") for curve in curves),
            *(_number(dB.get(k), "{:+.2f}").replace("-0.00", "+0.00") for _, dB, _ in compared),
        ]
        for k in sorted({k for curve in curves for k in curve.power}, reverse=True)
    ]
    return "\n".join("\t".join(row) for row in [header, *rows])


def plot(curves: Sequence[Curve]) -> Image.Image:
    """Power per wavelength on logarithmic axes; below it, where there is something to compare, the differences in dB.

    >>> plot([Curve("picture 1", "CNS off", "picture", {2: 0.5, 4: 1.0})]).size
    (1024, 1024)

    Args:
        curves: at least one.
    """
    paper = _Paper()
    names = [curve.label if _is_drawable(curve.label) else curve.name for curve in curves]
    columns = 1 if len(curves) == 1 else 2
    for i, (curve, name) in enumerate(zip(curves, names, strict=True)):
        x = LEFT + (i % columns) * (SIZE[0] - LEFT - RIGHT) // columns
        y = TOP + (i // columns) * ROW
        paper.line([(x, y + 20), (x + 56, y + 20)], COLORS[i], curve.kind == "latent")
        paper.text((x + 70, y), _shortened(name, (SIZE[0] - LEFT - RIGHT) // columns - 90), "la", FONT)
    top = TOP + -(-len(curves) // columns) * ROW + 62
    found = differences(curves)
    compared = [dB for dB in found if dB is not None]
    all_keys = [k for curve in curves for k in curve.power]
    low, high = min(all_keys) - 0.5, max(all_keys) + 0.5

    def across(k: float) -> float:
        """x of a half octave: coarse at the left, fine at the right."""
        return LEFT + (high - k) / (high - low) * (SIZE[0] - LEFT - RIGHT)

    bottom = SIZE[1] - BOTTOM
    split = top + (bottom - top - GAP) * 0.56 if compared else bottom
    powers = [power for curve in curves for power in curve.power.values() if power > 0] or [1.0]
    floor = max(min(powers), max(powers) * 10.0**-DECADES)
    decades = (math.floor(math.log10(floor) * 4) / 4, math.ceil(math.log10(max(powers)) * 4 + 0.01) / 4)
    panel = _Panel(paper, across, (top, split), decades)
    wide = max(1, math.ceil((decades[1] - decades[0]) / 5))
    panel.frame("power, logarithmic", [(e, f"{10.0**e:g}") for e in _steps(*decades, wide)], (low, high))
    for i, curve in enumerate(curves):
        points = {k: math.log10(power) for k, power in curve.power.items() if power > 0}
        under = found[i] is None and sum(one.kind == curve.kind for one in curves) > 1
        panel.curve(points, COLORS[i], curve.kind == "latent", 10 if under else 5)  # seen under one that equals it
    if compared:
        reach = _reach([abs(value) for dB in compared for value in dB.values() if math.isfinite(value)])
        panel = _Panel(paper, across, (split + GAP, bottom), (-reach, reach))
        kinds = {curve.kind for curve, dB in zip(curves, found, strict=True) if dB is not None}
        firsts = {curve.kind: name for curve, name in reversed(list(zip(curves, names, strict=True)))}
        against = " and ".join(firsts[kind] for kind in ("picture", "latent") if kind in kinds)
        caption = _shortened(f"difference in dB against {against}", SIZE[0] - RIGHT - LEFT)
        panel.frame(
            caption, [(y, f"{y:+g}" if y else "0") for y in (-reach, -reach / 2, 0, reach / 2, reach)], (low, high)
        )
        for i, dB in enumerate(found):
            if dB is not None:
                panel.curve({k: y for k, y in dB.items() if math.isfinite(y)}, COLORS[i], curves[i].kind == "latent")
    octaves = range(math.ceil(low / 2), math.floor(high / 2) + 1)
    for octave in octaves:
        if len(octaves) < 7 or octave % 2:  # 2, 8, 32, 128, 512
            paper.text((across(2 * octave), bottom + 8), f"{2**octave:g}", "ma", SMALL)
    paper.text(((LEFT + SIZE[0] - RIGHT) / 2, bottom + 50), "wavelength in pixels", "ma", FONT)
    paper.text((LEFT, bottom + 52), "coarse", "la", SMALL)
    paper.text((SIZE[0] - RIGHT, bottom + 52), "fine", "ra", SMALL)
    return paper.image.reduce(SMOOTH)


class _Paper:
    """What is drawn on, in pixels of the plot."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (SIZE[0] * SMOOTH, SIZE[1] * SMOOTH), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def text(self, place: tuple[float, float], words: str, anchor: str, size: int) -> None:
        self._draw.text(self._at(place), words, INK, _font(size * SMOOTH), anchor)

    def line(self, points: Sequence[tuple[float, float]], color: str, dashed: bool = False, width: int = 5) -> None:
        if not dashed:
            self._draw.line([self._at(point) for point in points], color, width * SMOOTH, joint="curve")
            return
        for (x0, y0), (x1, y1) in pairwise(points):
            pieces = max(1, round(math.hypot(x1 - x0, y1 - y0) / 12))
            for i in range(0, pieces, 2):
                ends = [(x0 + (x1 - x0) * j / pieces, y0 + (y1 - y0) * j / pieces) for j in (i, min(i + 1, pieces))]
                self._draw.line([self._at(point) for point in ends], color, width * SMOOTH)

    def dot(self, place: tuple[float, float], color: str, radius: float) -> None:
        (x, y), r = self._at(place), radius * SMOOTH
        self._draw.ellipse([x - r, y - r, x + r, y + r], color)

    def _at(self, place: tuple[float, float]) -> tuple[float, float]:
        return place[0] * SMOOTH, place[1] * SMOOTH


class _Panel:
    """A frame with two axes, between two heights of the paper."""

    def __init__(
        self, paper: _Paper, across: Callable[[float], float], span: tuple[float, float], limits: tuple[float, float]
    ) -> None:
        self._paper, self._across, self._span, self._limits = paper, across, span, limits

    def frame(self, caption: str, ticks: Sequence[tuple[float, str]], keys: tuple[float, float]) -> None:
        """The grid, with words for the values of ``ticks`` and a line for each octave between ``keys``."""
        (top, bottom), right = self._span, SIZE[0] - RIGHT
        for octave in range(math.ceil(keys[0] / 2), math.floor(keys[1] / 2) + 1):
            x = self._across(2 * octave)
            self._paper.line([(x, top), (x, bottom)], GRID, width=2)
        for value, words in ticks:
            y = self._down(value)
            self._paper.line([(LEFT, y), (right, y)], INK if words == "0" else GRID, width=2)
            self._paper.text((LEFT - 14, y), words, "rm", SMALL)
        self._paper.line([(LEFT, top), (LEFT, bottom), (right, bottom)], INK, width=2)
        self._paper.text((LEFT, top - 14), caption, "ls", FONT)

    def curve(self, points: dict[int, float], color: str, dashed: bool, width: int = 5) -> None:
        low, high = self._limits
        shown = [(self._across(k), self._down(min(max(y, low), high))) for k, y in sorted(points.items())]
        if len(shown) > 1:
            self._paper.line(shown, color, dashed, width)
        for place in shown:
            self._paper.dot(place, color, 4 + width / 2)

    def _down(self, value: float) -> float:
        (top, bottom), (low, high) = self._span, self._limits
        return bottom - (value - low) / (high - low) * (bottom - top)


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _is_drawable(text: str) -> bool:
    """Whether Pillow's own font has every letter."""
    font = _font(FONT)
    missing = bytes(font.getmask("\uffff"))
    return all(letter == " " or bytes(font.getmask(letter)) != missing for letter in text)


def _shortened(text: str, width: float) -> str:
    font = _font(FONT)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else form.format(value)


def _steps(low: float, high: float, step: int) -> list[int]:
    """Whole numbers from low to high that are multiples of ``step``."""
    first = math.ceil(low / step) * step
    return list(range(first, math.floor(high) + 1, step))


def _reach(values: Sequence[float]) -> float:
    """dB at the ends of the lower panel: the first of a row of round numbers that holds all; at least 1."""
    largest = max(values, default=0.0)
    for round_number in (1, 2, 4, 6, 10, 20, 40, 60):
        if largest <= round_number:
            return float(round_number)
    return 100.0
