"""The figure of the drift measurement."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.core import plotting
from llava_patch.core.extras import optional

if TYPE_CHECKING:
    from llava_patch.measurements.drift.result import DriftResult

SMALL = 0.002  # below this, differences from 1 are drawn themselves: at 1 - 1e-6 an axis of cosines cannot be read


def drift_figure(result: "DriftResult", path: str | Path) -> Path:
    """Median cosine over the layers at image and text positions; a pale band down to the lowest 5 %.

    Where all cosines are within `SMALL` of 1, their distance from 1 is drawn instead.

    Returns:
        The path written.
    """
    mpl = optional("matplotlib")

    figure, (axis,) = plotting.panels()
    with mpl.rc_context(plotting.STYLE):
        _draw(axis, result)
        figure.legend(loc="outside lower center", ncols=2)
        return plotting.write_figure(figure, path)


def _draw(axis: Any, result: "DriftResult") -> None:
    MaxNLocator = optional("matplotlib.ticker").MaxNLocator

    curves = (
        (result.image, plotting.IMAGE, "image positions", "o", 5, "none"),
        (result.text, plotting.TEXT, "text positions", "s", 2.5, plotting.TEXT),
    )
    layers = range(-1, result.layers)
    lowest = min(min(c.input, c.input_low, *c.median, *c.low) for c, *_ in curves)
    distance = 0 < 1 - lowest < SMALL
    for found, color, name, mark, size, fill in curves:
        median, low = [found.input, *found.median], [found.input_low, *found.low]
        if distance:
            median, low = [1 - v for v in median], [1 - v for v in low]
        axis.plot(layers, median, color=color, marker=mark, ms=size, mfc=fill, label=name)
        axis.fill_between(layers, low, median, color=color, alpha=0.15, lw=0)
    axis.fill_between([], [], [], color="0.6", alpha=0.4, lw=0, label="median to worst 5 %")
    if distance:
        axis.set_ylabel("1 - cosine with the base")
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
        axis.set_ylim(bottom=-0.04 * (1 - lowest))
    else:
        axis.set_ylabel("cosine with the base")
        room = 0.04 * (1 - lowest)
        axis.set_ylim(*((lowest - room, 1 + room) if room else (0.9, 1.02)))
    leaves = result.split == result.layers
    last = result.layers if leaves else result.layers - 1
    axis.set_xlim(-1.5, last + 0.5)
    numbers = MaxNLocator(nbins=10, integer=True).tick_values(0, max(last, 1))
    shown = sorted({int(v) for v in numbers if 0 <= v <= last} | ({last} if leaves else set()))
    axis.set_xticks([-1, *shown], ["in", *map(str, shown)])
    axis.set_xlabel("decoder layer (in: input of layer 0)")
    if leaves:
        (plotting.mark_pruning if result.prunes else plotting.mark_split)(axis, result.split)
    axis.set_title(f"Drift of the shallow layers, {result.samples} samples")
