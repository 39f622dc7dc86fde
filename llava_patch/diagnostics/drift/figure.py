"""The figure of the drift measurement."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llava_patch.diagnostics import plotting

if TYPE_CHECKING:
    from llava_patch.diagnostics.drift.result import DriftResult

SMALL = 0.01  # below this, differences from 1 are drawn themselves: at 1 - 1e-6 an axis of cosines cannot be read


def drift_figure(result: "DriftResult", path: str | Path) -> Path:
    """Median cosine over the layers at image and text positions; the lowest 5 % as a pale band.

    Returns:
        The path written.
    """
    from matplotlib.ticker import FixedLocator, MaxNLocator

    figure, (axis,) = plotting.panels()
    layers = range(-1, result.layers)
    curves = ((result.image, plotting.IMAGE, "image", "o"), (result.text, plotting.TEXT, "text", "s"))
    values = [[c.input, *c.median] for c, *_ in curves]
    spread = 1 - min(map(min, values))
    if 0 < spread < SMALL:
        for value, (_, color, name, mark) in zip(values, curves, strict=True):
            axis.plot(layers, [1 - v for v in value], color=color, marker=mark, ms=3, label=f"{name} positions")
        axis.set_ylabel("1 - median cosine with the base")
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
        axis.set_ylim(bottom=-0.05 * spread)
    else:
        for value, (found, color, name, mark) in zip(values, curves, strict=True):
            axis.fill_between(range(result.layers), found.low, found.median, color=color, alpha=0.15, lw=0)
            axis.plot(layers, value, color=color, marker=mark, ms=3, label=f"{name}, median")
        axis.plot([], [], color="0.6", lw=5, alpha=0.4, label="down to lowest 5 %")
        axis.set_ylabel("cosine with the base")
        axis.set_ylim(top=1.005) if spread > 0 else axis.set_ylim(0.9, 1.02)
    plotting.layer_axis(axis, result.layers + (result.split == result.layers), "decoder layer (in: input of layer 0)")
    axis.set_xlim(-1.5, result.layers - 0.5 + (result.split == result.layers))
    numbers = [v for v in MaxNLocator(nbins=10, integer=True).tick_values(0, max(result.layers - 1, 1)) if v >= 0]
    shown = [int(v) for v in numbers if v < result.layers + (result.split == result.layers)]
    axis.xaxis.set_major_locator(FixedLocator([-1, *shown]))
    axis.set_xticklabels(["in", *map(str, shown)])
    plotting.mark_split(axis, result.split if result.split == result.layers else None)
    axis.legend(loc="best")
    axis.set_title(f"Drift of the shallow layers, {result.samples} samples")
    return plotting.write_figure(figure, path)
