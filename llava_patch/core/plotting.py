"""What the measurements' figures share: size, type, layer axes, the split's line, and how they are written."""

from collections.abc import Iterable, Mapping, Sequence
from math import floor, isfinite, log10
from pathlib import Path
from typing import Any

from llava_patch.core.extras import optional
from llava_patch.core.files import atomic

IMAGE, TEXT, SPLIT, OTHER = "#c44e52", "#4c72b0", "#55a868", "#8172b3"
TITLE = 8.5  # points: of a panel and of a whole figure
PANEL = 3.4, 2.7  # inches: one panel fills a column of a two-column paper, and its type is of the size of a caption's
STYLE: dict[Any, Any] = {
    "font.size": 8.0,
    "axes.titlesize": TITLE,
    "axes.labelsize": 8.0,
    "legend.fontsize": 7.0,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "lines.linewidth": 1.3,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def panels(rows: int = 1, columns: int = 1, height: float = PANEL[1], width: float = PANEL[0]) -> tuple[Any, list[Any]]:
    """A figure without pyplot (no global state, no display) and its axes, row by row."""
    with optional("matplotlib").rc_context(STYLE):
        figure = optional("matplotlib.figure").Figure(figsize=(width * columns, height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def panel_grid(
    count: int, width: float = PANEL[0], height: float = PANEL[1], columns: int = 3
) -> tuple[Any, list[Any]]:
    """A figure with `count` panels, `columns` in a row, each at least as large as a usual one.

    Three fill a paper's page; a report is as wide as two.
    """
    columns = min(columns, count)
    figure, axes = panels(-(-count // columns), columns, max(height, PANEL[1]), max(width, PANEL[0]))
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def log_axis(axis: Any, values: Iterable[float]) -> float | None:
    """A logarithmic y axis on which zeros are drawn too.

    Without a zero among the values it is a plain one. With one it is linear below the decade of the smallest one over
    0, so that 0 has a place and a tick of its own: a plain one would leave it out.

    Returns:
        The value down to which the axis is logarithmic; None: nothing is above 0, and the axis stays as it is.
    """
    shown = [v for v in values if isfinite(v) and v >= 0]
    above = [v for v in shown if v > 0]
    if not above:
        return None
    low: float = 10.0 ** floor(log10(min(above)))
    if len(above) == len(shown):
        axis.set_yscale("log")
        return low
    ticker = optional("matplotlib.ticker")
    axis.set_yscale("symlog", linthresh=low, linscale=0.6)
    axis.set_ylim(bottom=-0.2 * low)  # half a mark at 0 would be cut off
    top, lowest = floor(log10(max(above))), floor(log10(low))
    step = max(1, (top - lowest) // 5)
    axis.set_yticks([0.0, *(10.0**n for n in range(lowest, top + 2, step))])
    axis.yaxis.set_major_formatter(ticker.LogFormatterMathtext())
    axis.yaxis.set_minor_locator(ticker.NullLocator())
    return low


def distinct(curves: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """Curves by name, those that are the same as an earlier one put together with it: `"a ≡ b"`.

    Drawn apart, all but the last of them would be hidden under it. NaN, where a curve has no value, equals NaN.
    """
    found: dict[str, Sequence[float]] = {}
    for name, values in curves.items():
        same = next((n for n, one in found.items() if len(one) == len(values) and all(map(_same, one, values))), None)
        if same is None:
            found[name] = values
        else:
            found = {f"{n} ≡ {name}" if n == same else n: one for n, one in found.items()}
    return found


def _same(one: float, other: float) -> bool:
    return one == other or (one != one and other != other)


def layer_axis(axis: Any, n_layers: int, label: str = "decoder layer") -> None:
    """Whole layer numbers, at most about a dozen of them."""
    ticker = optional("matplotlib.ticker")
    axis.set_xlim(-0.5, n_layers - 0.5)
    axis.xaxis.set_major_locator(ticker.MaxNLocator(nbins=12, integer=True, min_n_ticks=min(4, n_layers)))
    axis.set_xlabel(label)


def mark_split(axis: Any, split: int | None, label: str = "split") -> None:
    """A dashed line where image tokens leave the decoder; nothing where there is no split."""
    if split is not None:
        axis.axvline(split, color=SPLIT, ls="--", lw=1.2, label=f"{label} {split}")


def mark_pruning(axis: Any, layer: int | None) -> None:
    """A dash-dotted line at the first layer without the pruned image tokens; nothing where none are pruned."""
    if layer is not None:
        axis.axvline(layer, color=OTHER, ls="-.", lw=1.2, label=f"pruning from layer {layer}")


def shorten(name: str, length: int) -> str:
    """A name for a figure, at most so many characters of its end: folders say little."""
    return name if len(name) <= length else "…" + name[1 - length :]


def write_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure atomically, in the format that the path's suffix names."""
    path = Path(path)
    # Titles and legends take matplotlib's own size when they are made, after `panels`: they get the style's.
    for axis in figure.axes:
        if axis.title.get_fontsize() == 12.0:
            axis.title.set_fontsize(STYLE["axes.titlesize"])
        for text in axis.get_legend().get_texts() if axis.get_legend() else ():
            if text.get_fontsize() == 10.0:
                text.set_fontsize(STYLE["legend.fontsize"])
    with atomic(path) as temporary, optional("matplotlib").rc_context(STYLE):
        figure.savefig(temporary, dpi=200)
    return path
