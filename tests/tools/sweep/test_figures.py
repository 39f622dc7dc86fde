"""The plot shows every seed and every point, whatever is swept."""

from pathlib import Path

import pytest

from llava_patch.tools.sweep import bubbles, figures
from llava_patch.tools.sweep.outcome import FinalLoss
from llava_patch.tools.sweep.plan import Run
from llava_patch.tools.sweep.summary import Result


def _result(point, seed, loss, metrics=None, baseline=False):
    run = Run(point, seed, Path("x"), ("c",), (), (), baseline)
    return Result(run, None if loss is None else FinalLoss(loss, 50, 60), metrics or {})


def _grid():
    """Strides 4 and 12 with what each can detach, beside a baseline of loss 2 and accuracy 0.5."""
    results = [_result({"Patch.fusion": None}, 1, 2.0, {"ocr/acc": 0.5}, baseline=True)]
    for stride, detach, loss, score in ((4, 0, 1.5, 0.6), (4, 1, 2.25, 0.4), (4, 2, None, None), (12, 0, 2.0, 0.5)):
        metrics = {} if score is None else {"ocr/acc": score}
        results.append(_result({"SkipLinks.stride": stride, "SkipLinks.detach": detach}, 1, loss, metrics))
    return results


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws results and returns the figure."""
    from matplotlib.figure import Figure

    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k)))

    def draw(results, draw=figures.sweep_figure):
        draw(results, tmp_path / "a.png")
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


def test_a_baseline_is_a_line_and_not_a_point(drawn):
    loss, metric = drawn(_grid()).axes
    dashed = [line for line in loss.lines if line.get_linestyle() == "--"]
    assert [list(line.get_ydata()) for line in dashed] == [[2.0, 2.0]]
    assert loss.get_xlabel() == "SkipLinks.stride"
    assert [label.get_text() for label in loss.get_xticklabels()] == ["4", "12"]


def test_many_lines_stay_nearer_to_their_own_value(drawn):
    results = [_result({"a.x": x, "a.y": y}, 1, 10 * x + y) for x in (3, 4) for y in range(9)]
    (axis,) = drawn(results).axes
    (means,) = {len(line.get_xdata()) for line in axis.lines if line.get_linestyle() == "-"}
    assert means == 2
    for line in axis.lines:
        if line.get_linestyle() == "-":
            assert [round(x) for x in line.get_xdata()] == [y // 10 for y in line.get_ydata()] == [3, 4]


def test_bubbles_show_the_difference_to_the_baseline(drawn):
    loss, score = drawn(_grid(), bubbles.bubble_figure).axes
    assert (
        loss.get_xlabel() == "stride S (SkipLinks.stride)" and loss.get_ylabel() == "detached taps D (SkipLinks.detach)"
    )
    assert "lower is better" in loss.get_title() and score.get_title() == "ocr/acc (higher is better)"
    assert [label.get_text() for label in loss.get_xticklabels()] == ["baseline", "4", "12"]
    for axis, texts in ((loss, ["-0.50", "+0.25", "+0.00", "2"]), (score, ["+0.10", "-0.10", "+0.00", "0.5"])):
        assert [text.get_text() for text in axis.texts] == texts
        better, worse, same, baseline = axis.collections
        assert [list(b.get_offsets()[0]) for b in (better, worse, same, baseline)] == [[0, 0], [0, 1], [1, 0], [-1, 0]]
        red, green, _, _ = better.get_facecolor()[0]
        assert green > red  # less loss, more accuracy: green
        red, green, _, _ = worse.get_facecolor()[0]
        assert red > green
        assert list(same.get_facecolor()[0]) == list(baseline.get_facecolor()[0])  # yellow
        assert better.get_sizes()[0] > same.get_sizes()[0]
        (cross,) = [line for line in axis.lines if line.get_marker() == "x"]  # the run that failed
        assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (0, 2)
    assert loss.collections[0].get_sizes()[0] > loss.collections[1].get_sizes()[0]


def test_scores_take_the_place_of_the_metrics(drawn):
    results = _grid()
    for result in results:
        result.metrics["OCR"] = result.metrics.get("ocr/acc", 0.0)
    axes = drawn(results, lambda *a: bubbles.bubble_figure(*a, scores=["OCR", "average"])).axes
    assert [axis.get_title().split(" (")[0] for axis in axes][1:] == ["OCR"] and len(axes) == 2


@pytest.mark.parametrize(
    "results",
    [
        _grid()[1:],  # no baseline
        [_result({"Patch.fusion": None}, 1, None, baseline=True), *_grid()[1:]],  # it failed
        [_grid()[0], *(_result({"a.x": v, "a.y": 1}, 1, 2.0) for v in (1, 2))],  # one binding swept
        [_grid()[0], *(_result({"a.x": v, "a.y": str(v)}, 1, 2.0) for v in (1, 2))],  # words
        [_grid()[0], *(_result({"a.x": v, "a.y": v > 1}, 1, 2.0) for v in (1, 2))],  # truth values
        [_grid()[0], _result({"a.x": 1}, 1, 2.0), _result({"a.y": 1}, 1, 2.0)],  # a point without a place
    ],
)
def test_no_bubbles_for_another_kind_of_sweep(results, tmp_path):
    assert bubbles.bubble_figure(results, tmp_path / "b.png") is None and not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    ("name", "lower"),
    [("final loss", True), ("rprobe/rprobe_mse", True), ("a/word_perplexity", True), ("pope/accuracy", False),
     ("mme/lossless", False)],
)  # fmt: skip
def test_which_measurements_are_better_when_lower(name, lower):
    assert bubbles.lower_is_better(name) is lower
