"""The plot shows every seed and every point, whatever is swept."""

from pathlib import Path

import pytest

from llava_patch.sweep import figures
from llava_patch.sweep.outcome import FinalLoss
from llava_patch.sweep.plan import Run
from llava_patch.sweep.summary import Result


def _result(point, seed, loss, metrics=None):
    run = Run(point, seed, Path("x"), ("c",), (), ())
    return Result(run, FinalLoss(loss, 50, 60), metrics or {})


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws results and returns the figure."""
    from matplotlib.figure import Figure

    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k)))

    def draw(results):
        figures.sweep_figure(results, tmp_path / "a.png")
        return kept[-1]

    return draw


def test_dots_means_and_axis_titles(drawn):
    results = [_result({"Routing.split": s}, k, s + k, {"pope/acc": 0.5}) for s in (3, 5) for k in (1, 3)]
    loss, metric = drawn(results).axes
    assert loss.get_xlabel() == "Routing.split" and loss.get_ylabel() == "training loss (nats per token)"
    assert metric.get_ylabel() == "pope/acc"
    dots = [line for line in loss.lines if line.get_linestyle() == "None" and line.get_marker() == "o"]
    assert sorted(y for line in dots for y in line.get_ydata()) == [4, 6, 6, 8]
    (mean,) = [line for line in loss.lines if line.get_linestyle() == "-"]
    assert list(mean.get_xdata()) == [3, 5] and list(mean.get_ydata()) == [5, 7]


def test_words_on_the_axis_and_a_line_for_each_second_setting(drawn):
    results = [_result({"Routing.variant": v, "Routing.split": s}, 1, s) for v in ("lf", "pc") for s in (3, 5)]
    (axis,) = drawn(results).axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["lf", "pc"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["Routing.split = 3", "Routing.split = 5"]
