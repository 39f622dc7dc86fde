"""What figures share: zeros on a log axis, curves that are the same, panels in a row."""

import math

import pytest

from llava_patch.core import plotting


def drawn(values):
    figure, (axis,) = plotting.panels()
    axis.plot(range(len(values)), values, "o")
    low = plotting.log_axis(axis, values)
    figure.canvas.draw()
    return axis, low


def test_a_log_axis_has_a_place_for_zero():
    axis, low = drawn([0.0, 3e-4, 0.2])
    assert low == pytest.approx(1e-4) and axis.get_ylim()[0] < 0
    place = axis.transData.transform([(0, 0.0), (0, 3e-4), (0, 0.2)])[:, 1]
    bottom = axis.transAxes.transform((0, 0))[1]
    assert bottom < place[0] < place[1] < place[2] and math.isfinite(place[0])
    assert "0" in [
        label.get_text().strip("$").removeprefix("\\mathdefault{").rstrip("}") for label in axis.get_yticklabels()
    ]


def test_without_a_zero_it_is_a_plain_one_and_without_anything_above_it_is_left():
    assert drawn([1e-3, 1.0])[0].get_yscale() == "log"
    axis, low = drawn([0.0, 0.0, math.nan])
    assert low is None and axis.get_yscale() == "linear"


def test_curves_that_are_the_same_share_a_name():
    nan = math.nan
    curves = {"a": [1.0, nan], "b": [1.0, 2.0], "c": [1.0, nan], "d": [1.0, nan, 3.0]}
    assert list(plotting.distinct(curves)) == ["a ≡ c", "b", "d"]
    assert plotting.distinct(curves)["b"] == [1.0, 2.0]


def test_a_report_has_two_panels_in_a_row():
    for count, rows in ((1, 1), (2, 1), (3, 2), (4, 2)):
        figure, axes = plotting.panel_grid(count, columns=2)
        grid = axes[0].get_gridspec()
        assert len(axes) == len(figure.axes) == count and (grid.nrows, grid.ncols) == (rows, min(2, count))
