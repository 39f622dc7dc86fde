"""The bubble chart of a sweep over two numbers: how much each point is better or worse than the baseline.

After Figure 6 of "Detached Skip-Links and R-Probe": stride on one axis, detached layers on the other, size and colour
of a bubble for its difference to the baseline.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from llava_patch.core.extras import optional
from llava_patch.core.files import atomic
from llava_patch.tools.sweep.outcome import FINAL_STEPS
from llava_patch.tools.sweep.summary import LOSS, Result, bindings, by_point, measured, spreads

COLUMNS = 3
COLORS = "RdYlGn"  # red worse, yellow the baseline, green better
SMALLEST, LARGEST = 40.0, 1100.0  # areas of bubbles in square points
RANGE = 0.42  # of the colours to each side of yellow: the ends are too dark to tell apart
LOWER_IS_BETTER = frozenset(("loss", "error", "mse", "fvu", "wer", "cer", "perplexity", "ppl", "hallucination"))
AXES = {"SkipLinks.stride": "stride S (SkipLinks.stride)", "SkipLinks.detach": "detached taps D (SkipLinks.detach)"}


def lower_is_better(name: str) -> bool:
    """Whether a measurement's name says that less of it is better."""
    return bool(LOWER_IS_BETTER & set(re.split(r"[^a-z]+", name.lower())))


def swept_numbers(results: Sequence[Result]) -> tuple[str, str] | None:
    """The two bindings of a chart: the only ones with more than one value, and numbers at every point of the grid.

    Returns:
        (horizontal, vertical), in the grid's order; None when there is no baseline or it is another kind of sweep.
    """
    grid = [result for result in results if not result.run.baseline]
    if len(grid) == len(results):
        return None
    values: dict[str, list[Any]] = {}
    for key in bindings(grid):
        found = [result.run.point.get(key) for result in grid]
        if len(set(map(repr, found))) > 1:
            values[key] = found
    numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for found in values.values() for v in found)
    if len(values) != 2 or not numeric:
        return None
    first, second = values
    return first, second


def bubble_figure(results: Sequence[Result], path: Path, scores: Collection[str] = ()) -> Path | None:
    """One panel for the final loss and for each metric, or for each score where there are any.

    Args:
        results: of a sweep.
        path: where to write.
        scores: names of the sweep's own means of metrics.

    Returns:
        The path written; None for a sweep that this chart does not fit, or whose baseline failed.
    """
    Figure = optional("matplotlib.figure").Figure  # no pyplot: no global state, no display needed

    keys = swept_numbers(results)
    baseline = spreads([result for result in results if result.run.baseline])
    names = [name for name in measured(results) if name in baseline and math.isfinite(baseline[name].mean)]
    if keys is None or not names:
        return None
    if set(scores) & set(names):
        names = [name for name in names if name == LOSS or name in scores]
    points = [(point, group) for point, group in by_point(results) if not group[0].run.baseline]
    places = tuple({v: i for i, v in enumerate(sorted({point[key] for point, _ in points}))} for key in keys)
    columns = min(COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    width, height = 1.2 + 0.85 * (1 + len(places[0])), 1.5 + 0.48 * len(places[1])
    figure = Figure(figsize=(max(4.6, width) * columns, max(3.2, height) * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, name in zip(axes, names, strict=False):
        found = [(point, spreads(group).get(name)) for point, group in points]
        means = [
            (point[keys[0]], point[keys[1]], math.nan if spread is None else spread.mean) for point, spread in found
        ]
        _panel(axis, name, keys, places, means, baseline[name].mean)
    for axis in axes[len(names) :]:
        axis.remove()
    seeds = max(len(group) for _, group in by_point(results))
    seeds_text = "One seed a point." if seeds == 1 else f"Means of up to {seeds} seeds."
    title = (
        f"Difference to the baseline (yellow): green better, red worse; area by its size. Cross: failed. {seeds_text}"
    )
    figure.suptitle(textwrap.fill(title, 60 * columns), fontsize=10)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=140)
    return path


def _panel(
    axis: Any,
    name: str,
    keys: tuple[str, str],
    places: tuple[dict[Any, int], ...],
    means: Sequence[tuple[Any, Any, float]],
    baseline: float,
) -> None:
    """One measurement.

    Args:
        axis: matplotlib's.
        name: of the measurement.
        keys: horizontal and vertical binding.
        places: of each one's values; equal steps, or strides 3 and 4 would lie on one another beside 12.
        means: (horizontal value, vertical value, mean or not-a-number).
        baseline: its mean.
    """
    matplotlib = optional("matplotlib")

    sign = -1 if lower_is_better(name) else 1
    largest = max((abs(mean - baseline) for *_, mean in means if math.isfinite(mean)), default=0.0) or 1.0
    colors = matplotlib.colormaps[COLORS]
    for horizontal, vertical, mean in means:
        x, y = places[0][horizontal], places[1][vertical]
        if not math.isfinite(mean):
            axis.plot(x, y, "x", color="0.4", ms=9, mew=2)
            continue
        difference = mean - baseline
        area = SMALLEST + (LARGEST - SMALLEST) * abs(difference) / largest
        color = colors(0.5 + RANGE * sign * difference / largest)
        axis.scatter([x], [y], s=area, color=[color], edgecolors="0.25", linewidths=0.8, zorder=3)
        radius = math.sqrt(area / math.pi)
        # Beside the bubble: inside it would be wider than a small one, and unreadable on dark green.
        axis.annotate(
            _signed(difference, largest), (x, y), (radius + 2, 0), textcoords="offset points", va="center", fontsize=8
        )
    axis.scatter([-1], [0], s=4 * SMALLEST, color=[colors(0.5)], edgecolors="0.25", linewidths=0.8, zorder=3)
    axis.annotate(f"{baseline:.4g}", (-1, 0), (0, 11), textcoords="offset points", ha="center", fontsize=8)
    axis.axvline(-0.5, color="0.8", lw=1)
    axis.set_xticks([-1, *places[0].values()], ["baseline", *map(str, places[0])])
    axis.set_yticks(list(places[1].values()), list(map(str, places[1])))
    axis.set_xlim(-1.6, len(places[0]) - 0.15)
    axis.set_ylim(-0.7, len(places[1]) - 0.3)
    axis.set_xlabel(AXES.get(keys[0], keys[0]))
    axis.set_ylabel(AXES.get(keys[1], keys[1]))
    title = f"Training loss, mean of the final {FINAL_STEPS} steps" if name == LOSS else name
    axis.set_title(f"{title} ({'lower' if sign < 0 else 'higher'} is better)", fontsize=10)
    axis.grid(alpha=0.25)
    axis.set_axisbelow(True)


def _signed(difference: float, largest: float) -> str:
    """As many digits as tell the differences of a panel apart."""
    digits = max(0, 1 - math.floor(math.log10(largest)))
    return f"{difference:+.{digits}f}"
