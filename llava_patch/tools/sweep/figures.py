"""The figures of a sweep: a panel for everything measured, and a bubble chart where two numbers are swept.

The bubble chart shows how much each point is better or worse than the baseline, after Figure 6 of "Detached Skip-Links
and R-Probe": stride on one axis, detached layers on the other, size and colour of a bubble for its difference.
"""

import itertools
import math
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_patch.core.extras import optional
from llava_patch.core.plotting import TITLE, panel_grid, write_figure
from llava_patch.settings.checks import is_number
from llava_patch.tools.sweep.record import FINAL_STEPS
from llava_patch.tools.sweep.settings import describe
from llava_patch.tools.sweep.summary import LOSS, Result, Spread, bindings, by_point, measured, spreads

COLORS = "RdYlGn"  # red worse, yellow the baseline, green better
DRAWN = 1e100  # larger numbers have no axis; the tables have them
SMALLEST, LARGEST = 25.0, 700.0  # areas of bubbles in square points
TEXT: dict[str, Any] = {"fontsize": 7.0}
RANGE = 0.42  # of the colours to each side of yellow: the ends are too dark to tell apart
LOWER_IS_BETTER = frozenset(("loss", "error", "mse", "fvu", "wer", "cer", "perplexity", "ppl", "hallucination"))
AXES = {"SkipLinks.stride": "stride S (SkipLinks.stride)", "SkipLinks.detach": "detached taps D (SkipLinks.detach)"}


def sweep_figure(results: Sequence[Result], path: Path) -> Path:
    """Final loss and each metric over the first swept binding; one line for each combination of the others.

    The baseline of a sweep, which has no place on that axis, is a dashed line.
    """
    names = measured(results)
    figure, axes = panel_grid(len(names))
    swept = [result for result in results if not result.run.baseline]
    baseline = spreads([result for result in results if result.run.baseline])
    for axis, name in zip(axes, names, strict=True):
        _lines(axis, swept, name)
        if name in baseline and abs(baseline[name].mean) < DRAWN:
            axis.axhline(baseline[name].mean, color="0.4", ls="--", lw=1.2, label="baseline", zorder=1)
            axis.legend()
    seeds = sorted({result.run.seed for result in results})
    word = "seed" if len(seeds) == 1 else "seeds"
    figure.suptitle(
        f"Sweep of {', '.join(bindings(swept))} ({word} {', '.join(map(str, seeds))})"
        "\nsmall dots: single seeds; large dots and bars: mean ± std",
        fontsize=TITLE,
    )
    return write_figure(figure, path)


def _lines(axis: Any, results: Sequence[Result], name: str) -> None:
    key = next(iter(results[0].run.point))
    lines: dict[str, list[tuple[Any, list[float]]]] = {}
    for point, group in by_point(results):
        others = describe({k: v for k, v in point.items() if k != key})
        found = (result.values().get(name, math.inf) for result in group)
        values = [value for value in found if not abs(value) >= DRAWN]
        lines.setdefault(others, []).append((point[key], values))
    swept = list(dict.fromkeys(value for points in lines.values() for value, _ in points))
    numeric = all(map(is_number, swept))
    place = {value: value if numeric else i for i, value in enumerate(swept)}
    gap = min((b - a for a, b in itertools.pairwise(sorted(place.values()))), default=1)
    for i, (others, points) in enumerate(lines.items()):
        # Several lines would hide one another's bars; many must stay nearer to their own value than to the next.
        shift = min(0.16, 0.6 / len(lines)) * gap * (i - (len(lines) - 1) / 2)
        color = f"C{i}"
        done = [(place[value] + shift, Spread.of(values)) for value, values in points if values]
        for value, values in points:
            at = [place[value] + shift + 0.05 * gap] * len(values)
            axis.plot(at, values, "o", color=color, ms=4, alpha=0.45, mew=0, zorder=3)
        deviations = [math.nan if spread.std is None else spread.std for _, spread in done]
        places, means = [x for x, _ in done], [spread.mean for _, spread in done]
        axis.errorbar(places, means, deviations, fmt="o-", color=color, ms=6, lw=1.5, capsize=4, label=others or None)
    axis.set_xticks(list(place.values()), [str(value) for value in swept])
    axis.margins(x=0.12)
    axis.set_xlabel(key)
    axis.set_ylabel("training loss (nats per token)" if name == LOSS else name)
    axis.set_title(_title(name))
    axis.ticklabel_format(axis="y", useOffset=False)
    if len(lines) > 1:
        axis.legend()


def _title(name: str) -> str:
    return f"Training loss, mean of the final {FINAL_STEPS} steps" if name == LOSS else name


def lower_is_better(name: str) -> bool:
    """Whether a measurement's name says that less of it is better."""
    return bool(LOWER_IS_BETTER & set(re.split(r"[^a-z]+", name.lower())))


def bubble_figure(results: Sequence[Result], path: Path, scores: Collection[str] = ()) -> Path | None:
    """One panel for the final loss and for each metric, or for each score where there are any.

    None for another sweep than one of two bindings, whose several values are all numbers, with a baseline.
    """
    grid = [result for result in results if not result.run.baseline]
    values = {key: [result.run.point.get(key) for result in grid] for key in bindings(grid)}
    keys = [key for key, found in values.items() if len(set(map(repr, found))) > 1]
    baseline = spreads([result for result in results if result.run.baseline])
    names = [name for name in measured(results) if name in baseline and abs(baseline[name].mean) < DRAWN]
    if not names or len(keys) != 2 or not all(is_number(value) for key in keys for value in values[key]):
        return None
    if set(scores) & set(names):
        names = [name for name in names if name == LOSS or name in scores]
    points = [(point, spreads(group)) for point, group in by_point(results) if not group[0].run.baseline]
    places = {key: {v: i for i, v in enumerate(sorted({point[key] for point, _ in points}))} for key in keys}
    (x, y), (columns, rows) = keys, map(len, places.values())
    figure, axes = panel_grid(len(names), max(4.0, 1.0 + 0.7 * (1 + columns)), max(3.0, 1.2 + 0.4 * rows))
    for axis, name in zip(axes, names, strict=True):
        means = [(places[x][point[x]], places[y][point[y]], _drawn(found.get(name))) for point, found in points]
        _bubbles(axis, name, places, means, baseline[name].mean)
    seeds = max(len(group) for _, group in by_point(results))
    title = "Difference to the baseline (yellow): green better, red worse; area by its size. Cross: failed. "
    title += "One seed a point." if seeds == 1 else f"Means of up to {seeds} seeds."
    figure.suptitle(textwrap.fill(title, 50 * min(3, len(names))), fontsize=TITLE)
    return write_figure(figure, path)


def _drawn(spread: Spread | None) -> float:
    return math.nan if spread is None or abs(spread.mean) >= DRAWN else spread.mean


def _bubbles(
    axis: Any, name: str, places: Mapping[str, dict[Any, int]], means: Sequence[tuple[int, int, float]], baseline: float
) -> None:
    sign = -1 if lower_is_better(name) else 1
    largest = max((abs(mean - baseline) for *_, mean in means if math.isfinite(mean)), default=0.0) or 1.0
    digits = max(0, 1 - math.floor(math.log10(largest)))  # as many as tell the differences of a panel apart
    colors = optional("matplotlib").colormaps[COLORS]
    for x, y, mean in means:
        if not math.isfinite(mean):
            axis.plot(x, y, "x", color="0.4", ms=9, mew=2)
            continue
        difference = mean - baseline
        area = SMALLEST + (LARGEST - SMALLEST) * abs(difference) / largest
        color = colors(0.5 + RANGE * sign * difference / largest)
        axis.scatter([x], [y], s=area, color=[color], edgecolors="0.25", linewidths=0.8, zorder=3)
        # Beside the bubble: inside it would be wider than a small one, and unreadable on dark green.
        beside = (math.sqrt(area / math.pi) + 2, 0)
        axis.annotate(f"{difference:+.{digits}f}", (x, y), beside, textcoords="offset points", va="center", **TEXT)
    axis.scatter([-1], [0], s=4 * SMALLEST, color=[colors(0.5)], edgecolors="0.25", linewidths=0.8, zorder=3)
    axis.annotate(f"{baseline:.4g}", (-1, 0), (0, 11), textcoords="offset points", ha="center", **TEXT)
    axis.axvline(-0.5, color="0.8", lw=1)
    (across, columns), (up, rows) = places.items()
    axis.set_xticks([-1, *columns.values()], ["baseline", *map(str, columns)])
    axis.set_yticks(list(rows.values()), list(map(str, rows)))
    axis.set(xlim=(-1.6, len(columns) - 0.15), ylim=(-0.7, len(rows) - 0.3))
    axis.set(xlabel=AXES.get(across, across), ylabel=AXES.get(up, up))
    axis.set_title(f"{_title(name)} ({'lower' if sign < 0 else 'higher'} is better)")
    axis.set_axisbelow(True)
