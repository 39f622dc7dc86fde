"""Figures of the gradient statistics: figure 3 of the Skip-Links paper, and several runs over one another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from llava_patch.core.extras import optional
from llava_patch.core.plotting import IMAGE, SPLIT, STYLE, TEXT, panels, write_figure
from llava_patch.measurements.gradients.moments import Moments, Step
from llava_patch.measurements.gradients.result import GradientsResult

SKIP, MAIN, RUNNING = IMAGE, TEXT, "0.25"
DOTS = {"ls": "none", "marker": ".", "ms": 2.5, "mew": 0}
FEW = 60  # steps whose dots are drawn large
SMALL_DELTA = 0.1  # the paper: "typically below 0.1"


def gradients_figure(result: GradientsResult, path: str | Path) -> Path:
    """Four panels over the training steps: squared norms, variances, cosine, delta.

    As figure 3 of the paper: (a) ||g||^2 of each step as dots, and the squared norm of each window's mean as a line
    over its steps; (b) trace of the covariance; (c) cosine of skip and main gradient; (d) delta. Windows alternate
    between white and grey; t_trans is a dashed line.

    Returns:
        The path written.
    """
    mpl = optional("matplotlib")

    with mpl.rc_context(STYLE):
        return write_figure(_four_panels(result), path)


def _four_panels(result: GradientsResult) -> Any:
    figure, (norms, traces, cosine, delta) = panels(2, 2)
    steps = [s for s in result.steps if s.finite]
    each = "each step" if result.trains else "each batch"
    for name, color in (("skip", SKIP), ("main", MAIN)):
        _dots(norms, steps, [getattr(s, name) for s in steps], color, f"{name}, {each}")
        _levels(norms, result.windows, f"{name}_mean", color, f"{name}, window")
        _levels(traces, result.windows, f"{name}_trace", color)
    _positive_log(norms)
    _positive_log(traces)
    _describe(norms, r"(a) Norms: $\|g\|^2$ and $\|$window's mean $g\|^2$", "squared norm")
    _describe(traces, r"(b) Variance in a window", r"tr $\Sigma$ (squared norm)")

    values = [s.cosine for s in steps]
    _dots(cosine, steps, values, SKIP)
    cosine.plot(
        *_running([s.step for s in steps], values, result.settings.window), color=RUNNING, label="running median"
    )
    cosine.axhline(0, color="0.5", lw=0.8, zorder=0)
    widest = max([abs(v) for v in values if not math.isnan(v)], default=0.0)
    reach = min(1.05, max(0.05, 1.2 * widest))
    cosine.set_ylim(-reach, reach)
    _describe(cosine, "(c) Direction of skip against main", r"cosine of $g_\mathrm{skip}$ and $g_\mathrm{main}$")

    middles = [(w.first + w.last) / 2 for w in result.windows]
    delta.plot(middles, [w.delta for w in result.windows], "o", color=SKIP, ms=3.5)
    delta.axhline(SMALL_DELTA, color="0.4", ls=":", lw=1, label=rf"$\delta$ = {SMALL_DELTA} (paper: below)")
    delta.set_ylim(0, 1.15 * max([SMALL_DELTA, *(w.delta for w in result.windows if math.isfinite(w.delta))]))
    _describe(delta, r"(d) Cross-covariance in a window", r"$\delta$ (share of tr $\Sigma_\mathrm{skip}$)")

    for axis in (norms, traces, cosine, delta):
        _shade(axis, result.windows)
        if result.transition is not None:
            label = rf"$t_\mathrm{{trans}}$ = {result.transition}" if axis is norms else None
            axis.axvline(result.transition, color=SPLIT, ls="--", lw=1.2, label=label)
        _step_axis(axis, [s.step for s in result.steps], "training step" if result.trains else "batch")
    figure.suptitle(_title(result), fontsize=8.5)
    scale = 1 if len(steps) <= FEW else 3
    figure.legend(loc="outside lower center", ncols=4, handlelength=1.6, columnspacing=1.4, markerscale=scale)
    return figure


def runs_figure(results: Mapping[str, GradientsResult], path: str | Path) -> Path:
    """Running median of ||g_skip|| / ||g_main|| of several runs over the training steps, and their t_trans.

    Args:
        results: by name, in the order of the legend.
        path: where it goes.

    Returns:
        The path written.
    """
    mpl = optional("matplotlib")

    with mpl.rc_context(STYLE):
        return write_figure(_two_panels(results, mpl.colormaps["viridis"]), path)


def _two_panels(results: Mapping[str, GradientsResult], colors: Any) -> Any:
    figure, (ratio, delta) = panels(1, 2)
    last = 1
    for number, (name, result) in enumerate(results.items()):
        color = colors(0.9 * number / max(1, len(results) - 1))
        steps = [s for s in result.steps if math.isfinite(s.ratio)]
        where, values = _running([s.step for s in steps], [s.ratio for s in steps], result.settings.window)
        rate = result.facts.get("learning_rate")
        ratio.plot(where, values, color=color, label=f"{name} (lr {rate:g})" if rate else name)
        if result.transition is not None:
            ratio.axvline(result.transition, color=color, ls="--", lw=1)
        middles = [(w.first + w.last) / 2 for w in result.windows]
        delta.plot(middles, [w.delta for w in result.windows], "o-", color=color, ms=3, lw=0.8)
        last = max([last, *(s.step for s in result.steps)])
    ratio.axhline(1, color="0.5", lw=0.8, zorder=0)
    _positive_log(ratio)
    _describe(
        ratio, r"Skip against main, running median (dashed: $t_\mathrm{trans}$)",
        r"$\|g_\mathrm{skip}\|/\|g_\mathrm{main}\|$",
    )  # fmt: skip
    delta.axhline(SMALL_DELTA, color="0.4", ls=":", lw=1, label=rf"$\delta$ = {SMALL_DELTA} (paper: below)")
    delta.set_ylim(bottom=0)
    _describe(delta, "Cross-covariance in a window", r"$\delta$ (share of tr $\Sigma_\mathrm{skip}$)")
    for axis in (ratio, delta):
        _step_axis(axis, [1, last], "training step")
    figure.legend(loc="outside lower center", ncols=min(3, len(results) + 1), handlelength=1.6)
    return figure


def _title(result: GradientsResult) -> str:
    facts = result.facts
    parts = [f"block {facts['block']}"] if "block" in facts else []
    parts += [str(facts["fusion"]).split("(")[0]] if facts.get("fusion") else []
    if result.trains and facts.get("learning_rate"):
        parts.append(f"learning rate {facts['learning_rate']:g}")
    parts += [f"batch {facts['batch']}"] if facts.get("batch") else []
    parts.append(f"windows of {result.settings.window}")
    return "Gradient statistics: " + ", ".join(parts)


def _dots(axis: Any, steps: "Sequence[Step]", values: Sequence[float], color: str, label: str | None = None) -> None:
    few = len(steps) <= FEW
    axis.plot(
        [s.step for s in steps],
        values,
        color=color,
        alpha=0.9 if few else 0.45,
        label=label,
        **DOTS | {"ms": 5 if few else 2.5},
    )


def _levels(axis: Any, windows: "Sequence[Moments]", name: str, color: str, label: str | None = None) -> None:
    """One level line a window, from its first step to its last."""
    for number, window in enumerate(windows):
        axis.plot(
            [window.first, window.last], [getattr(window, name)] * 2, color=color, label=None if number else label
        )  # fmt: skip


def _running(where: Sequence[int], values: Sequence[float], window: int) -> tuple[list[int], list[float]]:
    """Median of the last `window` values (of fewer at the beginning)."""
    known = [(w, v) for w, v in zip(where, values, strict=True) if not math.isnan(v)]
    medians = [median(v for _, v in known[max(0, i + 1 - window) : i + 1]) for i in range(len(known))]
    return [w for w, _ in known], medians


def _shade(axis: Any, windows: "Sequence[Moments]") -> None:
    for window in windows[::2]:
        axis.axvspan(window.first - 0.5, window.last + 0.5, color="0.5", alpha=0.1, lw=0)


def _positive_log(axis: Any) -> None:
    """A logarithmic axis where there is something above zero to show; plain numbers where it spans little."""
    ticker = optional("matplotlib.ticker")

    shown = [v for line in axis.lines for v in line.get_ydata() if v > 0 and math.isfinite(v)]
    if not shown:
        return
    axis.set_yscale("log")
    if max(shown) / min(shown) < 50:
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def _step_axis(axis: Any, steps: Sequence[int], label: str) -> None:
    MaxNLocator = optional("matplotlib.ticker").MaxNLocator

    if steps:
        margin = max(0.5, 0.02 * (max(steps) - min(steps)))
        axis.set_xlim(min(steps) - margin, max(steps) + margin)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axis.set_xlabel(label)


def _describe(axis: Any, title: str, y_label: str) -> None:
    axis.set_title(title)
    axis.set_ylabel(y_label)
