"""Figures at a report's width: at most two panels in a row, zeros at 0, curves that are the same under one name."""

import math
from dataclasses import replace

import pytest

from llava_patch import Routing
from llava_patch.measurements.flops.count import Prompt
from llava_patch.measurements.flops.result import flops_figure, measure_flops
from llava_patch.measurements.flops.shape import named
from llava_patch.measurements.gradients.figure import gradients_figure
from llava_patch.measurements.gradients.measurement import Gradients
from llava_patch.measurements.gradients.moments import Step
from llava_patch.measurements.gradients.result import GradientsResult
from llava_patch.measurements.reach.figures import comparison_figure, reach_figure
from llava_patch.measurements.reach.measurement import (
    LAYER,
    NONE,
    NONZERO,
    PROJECTOR,
    SIDE,
    ZERO,
    Part,
    PartReach,
    ReachComparison,
    ReachResult,
    SideReach,
)
from llava_patch.measurements.saturation.figure import saturation_figure
from llava_patch.measurements.saturation.result import Curves, SaturationResult


def made(figure, result):
    """The figure before it is written."""
    return figure.__wrapped__(result)


def labels(axis):
    return axis.get_legend_handles_labels()[1]


def lines(axis):
    return {line.get_label(): line for line in axis.lines}


def columns(figure):
    return figure.axes[0].get_gridspec().ncols


def at_zero(axis, line):
    """Heights in pixels above the lower edge, of a line's points that are 0."""
    bottom = axis.transAxes.transform((0, 0))[1]
    return [axis.transData.transform((0, y))[1] - bottom for y in line.get_ydata() if y == 0]


def saturation(withdrawn, fused):
    mass = [[0.6], [0.2], [0.0], [0.0]]
    curves = Curves([0.9] * 4, [0.9] * 4, mass, [2.0, 1.0, 0.0, 0.0], [2.0, 1.0, 0.5, 0.0], [4] * 4, [4] * 4,
                    withdrawn_kl=withdrawn, fused_kl=fused)  # fmt: skip
    return SaturationResult(curves, 4)


def part(kind, state, norm=0.0, number=None):
    return PartReach(Part(kind, number), 10, 10, 1, int(state != NONE), state, norm)


def reach(variant="lf", layers=None, states=(NONZERO, ZERO, NONE)):
    parts = [part(PROJECTOR, NONZERO, 2e-3), *(part(LAYER, s, 0.5 * (s == NONZERO), i) for i, s in enumerate(states))]
    parts += [part(SIDE, NONZERO, 0.1, 0)]
    side = SideReach(1.0, {1: 0.0, 2: 1.0} if layers is None else layers, (2,))
    return ReachResult(variant, tuple(parts), side, 3, 1, 2, 1.0, "float32")


def test_saturation_and_reach_have_two_columns():
    for result in (saturation([1.0, 0.5, 0.0, 0.0], [1.0, 0.2, 0.0, 0.0]), saturation([], [])):
        assert columns(made(saturation_figure, result)) == 2
    assert columns(made(reach_figure, reach())) == columns(made(reach_figure, replace(reach(), side=None))) == 2


def test_saturations_zeros_are_whole_marks():
    figure = made(saturation_figure, saturation([1.0, 0.5, 0.0, 0.0], [1.0, 0.2, 0.0, 0.0]))
    figure.canvas.draw()
    for axis in figure.axes[1:]:
        heights = [height for line in axis.lines if line.get_marker() == "o" for height in at_zero(axis, line)]
        assert heights and min(heights) >= 1.25 * figure.dpi / 72, axis.get_title()  # half of a mark of 2.5 points


@pytest.mark.parametrize("same", [True, False])
def test_answers_that_lose_the_same_either_way_are_one_line(same):
    lost = [1.0, 0.5, 0.1, 0.0]
    axis = made(saturation_figure, saturation(lost, lost if same else [1.0, 0.4, 0.1, 0.0])).axes[3]
    both = "image gone for good ≡ last layer sees it again"
    assert (both in labels(axis)) == same and ("last layer sees it again" in labels(axis)) != same


def test_a_gradient_of_zero_stands_at_zero_and_none_at_all_below():
    figure = made(reach_figure, reach())
    figure.canvas.draw()
    _, decoder, side = figure.axes
    assert list(lines(decoder)["exactly 0"].get_ydata()) == [0.0] and decoder.get_yscale() == "symlog"
    (zero,) = at_zero(decoder, lines(decoder)["exactly 0"])
    none = lines(decoder)["none arrives"]
    assert 0 < none.get_transform().transform((2, none.get_ydata()[0]))[1] - decoder.bbox.y0 < zero
    assert at_zero(side, lines(side)["lf: exactly 0"])[0] > 0


def test_variants_of_one_gradient_are_one_line():
    results = [reach("lf"), reach("pc", {1: 2.0, 2: 1.0}), reach("kv")]
    axis = made(comparison_figure, ReachComparison(tuple(results))).axes[0]
    assert "lf ≡ kv" in labels(axis) and "pc" in labels(axis) and "kv" not in labels(axis)


def test_a_skip_gradient_of_zero_is_drawn():
    steps = [Step(1, 1.0, 0.0, 1.0, 0.0), Step(2, 1.0, 1e-3, 1.0, 0.0)]
    figure = made(gradients_figure, GradientsResult(steps, [], Gradients(window=2)))
    figure.canvas.draw()
    axis = figure.axes[0]
    assert at_zero(axis, lines(axis)["skip, each step"])[0] > 0 and math.isfinite(axis.get_ylim()[0])


def test_flops_of_what_is_configured_and_of_its_variant_are_one_line():
    same = measure_flops(named("small"), [Prompt(64)], own=(Routing(split=4), None))
    other = measure_flops(named("small"), [Prompt(64)], split=4, own=(Routing(split=2), None))
    assert "LF, K = 1 ≡ as configured" in labels(made(flops_figure, same).axes[1])
    assert {"LF, K = 1", "as configured"} <= set(labels(made(flops_figure, other).axes[1]))
