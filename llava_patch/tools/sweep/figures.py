"""The plot of a sweep: one panel for everything measured, single seeds as dots, mean ± std beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_patch.core.extras import optional
from llava_patch.core.files import atomic
from llava_patch.tools.sweep.outcome import FINAL_STEPS
from llava_patch.tools.sweep.settings import describe
from llava_patch.tools.sweep.summary import LOSS, Result, Spread, bindings, by_point, measured, spreads

COLUMNS = 3


def sweep_figure(results: Sequence[Result], path: Path) -> Path:
    """Final loss and each metric over the first swept binding; one line for each combination of the others.

    The baseline of a sweep, which has no place on that axis, is a dashed line.

    Returns:
        The path written.
    """
    Figure = optional("matplotlib.figure").Figure  # no pyplot: no global state, no display needed

    names = measured(results)
    columns = min(COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    swept = [result for result in results if not result.run.baseline]
    baseline = spreads([result for result in results if result.run.baseline])
    key = next(iter(swept[0].run.point))
    seeds = sorted({result.run.seed for result in results})
    for axis, name in zip(axes, names, strict=False):
        _panel(axis, swept, key, name)
        if name in baseline:
            axis.axhline(baseline[name].mean, color="0.4", ls="--", lw=1.2, label="baseline", zorder=1)
            axis.legend(fontsize=8)
    for axis in axes[len(names) :]:
        axis.remove()
    word = "seed" if len(seeds) == 1 else "seeds"
    figure.suptitle(
        f"Sweep of {', '.join(bindings(swept))} ({word} {', '.join(map(str, seeds))})"
        "\nsmall dots: single seeds; large dots and bars: mean ± std", fontsize=10,
    )  # fmt: skip
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=140)
    return path


def _panel(axis: Any, results: Sequence[Result], key: str, name: str) -> None:
    lines: dict[str, list[tuple[Any, list[float]]]] = {}
    for point, group in by_point(results):
        others = describe({k: v for k, v in point.items() if k != key})
        values = [result.values()[name] for result in group if name in result.values()]
        lines.setdefault(others, []).append((point[key], values))
    swept = list(dict.fromkeys(value for points in lines.values() for value, _ in points))
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in swept)
    place = {value: value if numeric else i for i, value in enumerate(swept)}
    gap = min((b - a for a, b in zip(*_neighbours(sorted(place.values())), strict=True)), default=1)
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
    axis.set_title(f"Training loss, mean of the final {FINAL_STEPS} steps" if name == LOSS else name, fontsize=10)
    axis.grid(alpha=0.3)
    axis.ticklabel_format(axis="y", useOffset=False)
    if len(lines) > 1:
        axis.legend(fontsize=8)


def _neighbours(places: list[float]) -> tuple[list[float], list[float]]:
    return places[:-1], places[1:]
