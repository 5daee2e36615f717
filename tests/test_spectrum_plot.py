"""What CNS Spectrum shows: the differences, the table, and where the plot has its points."""

from __future__ import annotations

import math

import numpy as np
import pytest
from klein_cns.klein.spectrum_plot import COLORS, Curve, as_table, differences, plot

OFF = Curve("picture 1", "CNS off", "picture", {2: 1e-4, 4: 1e-2, 6: 1.0})
ON = Curve("picture 2", "CNS on", "picture", {2: 2e-4, 4: 1e-2, 6: 0.5, 8: 3.0})
LATENT = Curve("latent 1", "latent 1", "latent", {8: 1.0, 10: 2.0})


def colored(picture, color):
    """(x, y) of the pixels of about a colour, outside the legend."""
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    y, x = np.nonzero((np.abs(np.asarray(picture).astype(int) - rgb) < 12).all(-1))
    return x[y > 130], y[y > 130]


def test_differences_are_against_the_first_of_the_same_kind_where_both_have_a_value():
    found = differences([LATENT, OFF, ON])
    assert found[:2] == [None, None]
    assert found[2] == pytest.approx({2: 10 * math.log10(2), 4: 0.0, 6: -10 * math.log10(2)})


def test_the_table_is_for_a_spreadsheet():
    lines = [line.split("\t") for line in as_table([OFF, ON, LATENT]).splitlines()]
    assert lines == [
        ["wavelength in pixels", "power of CNS off", "power of CNS on", "power of latent 1",
         "dB of CNS on against CNS off"],
        ["32", "-", "-", "2", "-"],
        ["16", "-", "3", "1", "-"],
        ["8", "1", "0.5", "-", "-3.01"],
        ["4", "0.01", "0.01", "-", "+0.00"],
        ["2", "0.0001", "0.0002", "-", "+3.01"],
    ]  # fmt: skip


def test_the_plot_is_logarithmic_and_coarse_at_the_left():
    """A power law is a straight line that falls to the right, in the only panel of a single curve."""
    law = Curve("picture 1", "a", "picture", {k: 2.0 ** (k / 2) for k in range(1, 21)})
    x, y = colored(plot([law]), COLORS[0])
    line = np.polyfit(x, y, 1)
    assert line[0] > 0.5
    assert np.abs(y - np.polyval(line, x)).max() < 12
    assert len(np.unique(x)) > 700


def test_what_is_compared_has_a_panel_below_and_every_curve_its_colour():
    curves = [OFF, ON, Curve("picture 3", "x", "picture", {4: 0.1}), LATENT]
    picture = plot(curves)
    spans = [colored(picture, color)[1] for color in COLORS[: len(curves)]]
    assert all(len(span) for span in spans)
    assert max(spans[0]) < 640 < max(spans[1])  # the first is in the upper panel alone
    assert max(spans[3]) < 640  # a latent without another to compare with


def test_labels_that_do_not_fit_or_cannot_be_drawn_are_replaced():
    """By their beginning, or by the socket's name; the table has them whole."""
    same = plot([OFF._replace(label="picture 1")]).tobytes()
    assert plot([OFF._replace(label="彩色")]).tobytes() == same
    assert plot([OFF._replace(label="off")]).tobytes() != same
    assert "彩色" in as_table([OFF._replace(label="彩色")])
    long = plot([OFF._replace(label="w" * 500), ON])
    assert np.asarray(long)[:140, -20:].min() == 255  # nothing runs over the edge


def test_no_power_and_infinite_differences_are_drawn_nowhere():
    flat = Curve("picture 1", "flat", "picture", {2: 0.0, 4: 0.0})
    assert plot([flat]).size == plot([flat, ON]).size == (1024, 1024)
    assert as_table([flat, ON]).splitlines()[-1].split("\t")[-1] == "+inf"
