"""Figures of the gradient statistics: figure 3 of the Skip-Links paper, and several runs over one another."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from llava_patch.core.extras import optional
from llava_patch.core.plotting import IMAGE, SPLIT, TEXT, log_axis, panels
from llava_patch.measurements.base import drawn
from llava_patch.measurements.gradients.measurement import name_of
from llava_patch.measurements.gradients.moments import Moments, Step
from llava_patch.measurements.gradients.result import GradientsResult

SKIP, MAIN, RUNNING = IMAGE, TEXT, "0.25"
FEW = 60  # steps whose dots are drawn large
SMALL_DELTA = 0.1  # the paper: "typically below 0.1"


@drawn
def gradients_figure(result: GradientsResult) -> Any:
    """Four panels over the training steps: squared norms, variances, cosine, delta.

    As figure 3 of the paper: (a) ||g||^2 of each step as dots, and the squared norm of each window's mean as a line
    over its steps; (b) trace of the covariance; (c) cosine of skip and main gradient; (d) delta. Windows alternate
    between white and grey; t_trans is a dashed line.
    """
    figure, axes = panels(2, 2)
    norms, traces, cosine, delta = axes
    steps = [s for s in result.steps if s.finite]
    each = "each step" if result.trains else "each batch"
    for name, color in (("skip", SKIP), ("main", MAIN)):
        _dots(norms, steps, [getattr(s, name) for s in steps], color, f"{name}, {each}")
        _levels(norms, result.windows, f"{name}_mean", color, f"{name}, window")
        _levels(traces, result.windows, f"{name}_trace", color)
    _positive_log(norms)
    _positive_log(traces)
    norms.set(title=r"(a) Norms: $\|g\|^2$ and $\|$window's mean $g\|^2$", ylabel="squared norm")
    traces.set(title="(b) Variance in a window", ylabel=r"tr $\Sigma$ (squared norm)")

    values = [s.cosine for s in steps]
    _dots(cosine, steps, values, SKIP)
    cosine.plot(*_running(steps, values, result.settings.window), color=RUNNING, label="running median")
    cosine.axhline(0, color="0.5", lw=0.8, zorder=0)
    reach = min(1.05, max([0.05, *(1.2 * abs(v) for v in values if not math.isnan(v))]))
    unit = r"cosine of $g_\mathrm{skip}$ and $g_\mathrm{main}$"
    cosine.set(ylim=(-reach, reach), title="(c) Direction of skip against main", ylabel=unit)

    _draw_delta(delta, result, "o", color=SKIP, ms=3.5)
    delta.set_ylim(0, 1.15 * max([SMALL_DELTA, *(w.delta for w in result.windows if math.isfinite(w.delta))]))
    _describe_delta(delta, "(d) ")

    for axis in axes:
        for window in result.windows[::2]:
            axis.axvspan(window.first - 0.5, window.last + 0.5, color="0.5", alpha=0.1, lw=0)
        if result.transition is not None:
            label = rf"$t_\mathrm{{trans}}$ = {result.transition}" if axis is norms else None
            axis.axvline(result.transition, color=SPLIT, ls="--", lw=1.2, label=label)
        _step_axis(axis, [s.step for s in result.steps], "training step" if result.trains else "batch")
    facts = result.facts
    parts = [name_of(facts["block"])] if "block" in facts else []
    parts += [str(facts["fusion"]).split("(")[0]] if facts.get("fusion") else []
    parts += [f"learning rate {facts['learning_rate']:g}"] if result.trains and facts.get("learning_rate") else []
    parts += [f"batch {facts['batch']}"] if facts.get("batch") else []
    figure.suptitle(f"Gradient statistics: {', '.join([*parts, f'windows of {result.settings.window}'])}", fontsize=8.5)
    scale = 1 if len(steps) <= FEW else 3
    figure.legend(loc="outside lower center", ncols=4, handlelength=1.6, columnspacing=1.4, markerscale=scale)
    return figure


@drawn
def runs_figure(results: Mapping[str, GradientsResult]) -> Any:
    """Running median of ||g_skip|| / ||g_main|| of several runs over the training steps, and their t_trans.

    The results are by name, in the order of the legend.
    """
    colors = optional("matplotlib").colormaps["viridis"]
    figure, (ratio, delta) = panels(1, 2)
    for number, (name, result) in enumerate(results.items()):
        color = colors(0.9 * number / max(1, len(results) - 1))
        steps = [s for s in result.steps if math.isfinite(s.ratio)]
        rate = result.facts.get("learning_rate")
        running = _running(steps, [s.ratio for s in steps], result.settings.window)
        ratio.plot(*running, color=color, label=f"{name} (lr {rate:g})" if rate else name)
        if result.transition is not None:
            ratio.axvline(result.transition, color=color, ls="--", lw=1)
        _draw_delta(delta, result, "o-", color=color, ms=3, lw=0.8)
    ratio.axhline(1, color="0.5", lw=0.8, zorder=0)
    _positive_log(ratio)
    title = r"Skip against main, running median (dashed: $t_\mathrm{trans}$)"
    ratio.set(title=title, ylabel=r"$\|g_\mathrm{skip}\|/\|g_\mathrm{main}\|$")
    _describe_delta(delta)
    delta.set_ylim(bottom=0)
    last = max([1, *(s.step for result in results.values() for s in result.steps)])
    for axis in (ratio, delta):
        _step_axis(axis, [1, last], "training step")
    figure.legend(loc="outside lower center", ncols=min(3, len(results) + 1), handlelength=1.6)
    return figure


def _draw_delta(axis: Any, result: GradientsResult, mark: str, **style: Any) -> None:
    axis.plot([(w.first + w.last) / 2 for w in result.windows], [w.delta for w in result.windows], mark, **style)


def _describe_delta(axis: Any, letter: str = "") -> None:
    axis.axhline(SMALL_DELTA, color="0.4", ls=":", lw=1, label=rf"$\delta$ = {SMALL_DELTA} (paper: below)")
    axis.set(title=f"{letter}Cross-covariance in a window", ylabel=r"$\delta$ (share of tr $\Sigma_\mathrm{skip}$)")


def _dots(axis: Any, steps: Sequence[Step], values: Sequence[float], color: str, label: str | None = None) -> None:
    size, alpha = (5, 0.9) if len(steps) <= FEW else (2.5, 0.45)
    axis.plot([s.step for s in steps], values, ".", color=color, alpha=alpha, ms=size, mew=0, label=label)


def _levels(axis: Any, windows: Sequence[Moments], name: str, color: str, label: str | None = None) -> None:
    """One level line a window, from its first step to its last."""
    for window in windows:
        axis.plot([window.first, window.last], [getattr(window, name)] * 2, color=color, label=label)
        label = None


def _running(steps: Sequence[Step], values: Sequence[float], window: int) -> tuple[list[int], list[float]]:
    """Numbers of the steps, and the median of the last `window` of their values (of fewer at the beginning)."""
    known = [(s.step, v) for s, v in zip(steps, values, strict=True) if not math.isnan(v)]
    medians = [median(v for _, v in known[max(0, i + 1 - window) : i + 1]) for i in range(len(known))]
    return [number for number, _ in known], medians


def _positive_log(axis: Any) -> None:
    """A logarithmic axis, with zeros at 0, where there is more to show; plain numbers where it spans little."""
    ticker = optional("matplotlib.ticker")

    values = [v for line in axis.lines for v in line.get_ydata()]
    if log_axis(axis, values) is None or axis.get_yscale() != "log":
        return
    shown = [v for v in values if v > 0 and math.isfinite(v)]
    if max(shown) / min(shown) < 50:
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def _step_axis(axis: Any, steps: Sequence[int], label: str) -> None:
    if steps:
        margin = max(0.5, 0.02 * (max(steps) - min(steps)))
        axis.set_xlim(min(steps) - margin, max(steps) + margin)
    axis.xaxis.set_major_locator(optional("matplotlib.ticker").MaxNLocator(nbins=7, integer=True))
    axis.set_xlabel(label)
