"""Figures of a run: held-out regions beside what the probe made of them, the loss curve, error maps; PNG and PDF."""

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_patch.core.errors import InputError, SettingError
from llava_patch.core.extras import optional
from llava_patch.core.files import atomic
from llava_patch.core.plotting import shorten
from llava_patch.measurements.base import FIGURES
from llava_patch.measurements.rprobe.result import ErrorMap, Reconstruction, RProbeResult

if TYPE_CHECKING:
    from llava_patch.measurements.rprobe.correlate import Correlation

# Okabe and Ito's colours, told apart by colour-blind readers; dashes tell a second round of them apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKERS = "os^Dv*P"
FONT = 8.0
HEADROOM = 1.15
MSE_LABEL = "MSE (normalised pixel values²)"
DPI = 200
WIDTH = 7.0  # inches: the text width of a paper's page
TITLE, LABEL = 9.0, 8.0  # points
BLANK = 235  # grey of what is not under a target token
EDGE, GAP, HEAD, CAPTION, CURVE = 0.08, 0.1, 0.24, 0.2, 2.6  # inches
LOWEST, TALLEST = 0.5, 1.5  # inches of one row's pictures
Cut = tuple[int, int, int, int]  # (top, bottom, left, right) in pixels


def save_figure(result: RProbeResult, path: str | Path, documents: Sequence[str] | None = None) -> Path:
    """Draw original, region and reconstruction of held-out samples, and the loss curve with its baselines.

    `documents` are ids of samples to show, of those that the run kept (else an InputError); None: all of them. A
    SettingError where the path ends neither in .png nor in .pdf.
    """
    known = {example.id: example for example in result.examples}
    if unknown := [name for name in documents or () if name not in known]:
        raise InputError(f"no example {', '.join(unknown)}: this run kept {', '.join(known) or 'none'}")
    examples = result.examples if documents is None else [known[name] for name in documents]
    return save(_examples(result, examples), path)


def save(figure: Any, path: str | Path, dpi: float = DPI) -> Path:
    """Write a matplotlib figure atomically, in the format of the path's ending."""
    path = Path(path)
    suffix = path.suffix.lstrip(".").lower()
    if suffix not in FIGURES:
        raise SettingError(f"figure {path}: expected a name that ends in .{' or .'.join(FIGURES)}")
    # PDF carries the date of writing by default: the same run is to give the same file.
    extra = {"metadata": {"CreationDate": None}} if suffix == "pdf" else {}
    with atomic(path) as part:
        figure.savefig(part, format=suffix, dpi=dpi, **extra)
    return path


def place(figure: Any, left: float, bottom: float, wide: float, high: float) -> Any:
    """Axes without ticks for a picture, at a place in inches."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, bottom / height, wide / width, high / height))
    axes.set(xticks=[], yticks=[])
    return axes


def _examples(result: RProbeResult, examples: list[Reconstruction]) -> Any:
    masked = bool(result.settings["masked"])
    column = (WIDTH - 2 * EDGE - 2 * GAP) / 3
    rows: list[tuple[Reconstruction, Cut, float, float]] = []
    for example in examples:
        ys, xs = np.nonzero(example.target)
        cut = int(ys.min()), int(ys.max()) + 1, int(xs.min()), int(xs.max()) + 1
        wide, high = cut[3] - cut[2], (cut[1] - cut[0]) * example.stretch
        scale = min(column / wide, TALLEST / high)  # inches a processed pixel: a region fills its column or its row
        rows.append((example, cut, scale, max(LOWEST, high * scale)))
    height = (HEAD if examples else 0) + sum(row + CAPTION + GAP for *_, row in rows) + CURVE
    # matplotlib is imported late: runs without figures do not need it, and no global backend is touched.
    figure = optional("matplotlib.figure").Figure(figsize=(WIDTH, height))
    top_edge = height
    if examples:
        first = "tower's input, region blacked out" if masked else "tower's input, region outlined"
        for i, title in enumerate((first, "pixels under its tokens", "reconstruction")):
            x = EDGE + i * (column + GAP) + column / 2
            figure.text(x / WIDTH, 1 - 0.6 * HEAD / height, title, ha="center", va="center", fontsize=TITLE)
        top_edge -= HEAD
    for example, cut, scale, row in rows:
        text = textwrap.shorten(example.text, 44, placeholder="…") or example.text[:43] + "…"
        caption = f"{basename(example.id, 38)}: “{text}”   MSE {example.mse:.3f}, PSNR {example.psnr:.1f} dB"
        y = (top_edge - 0.55 * CAPTION) / height
        figure.text(EDGE / WIDTH, y, caption, fontsize=LABEL, va="center", parse_math=False)
        top_edge -= CAPTION + row
        _row(figure, example, cut, scale, (column, row), top_edge, masked)
        top_edge -= GAP
    axes = figure.add_axes((0.6 / WIDTH, 0.45 / height, (WIDTH - 2.65) / WIDTH, (CURVE - 0.8) / height))
    draw_curve(axes, result)
    return figure


def _row(
    figure: Any, example: Reconstruction, cut: Cut, scale: float, size: tuple[float, float], bottom: float, masked: bool
) -> None:
    """The three pictures of one sample; the last two at one magnification, nearest neighbour."""
    Rectangle = optional("matplotlib.patches").Rectangle
    column, row = size
    top, low, left, right = cut
    region, rebuilt = example.original[top:low, left:right].copy(), example.rebuilt[top:low, left:right].copy()
    hidden = ~example.target[top:low, left:right]
    region[hidden] = rebuilt[hidden] = BLANK
    around = _around(cut, example.original.shape[:2], example.stretch, size)
    context = example.original[around[0] : around[1], around[2] : around[3]]
    fit = min(column / context.shape[1], row / (context.shape[0] * example.stretch))
    for i, (shown, inches) in enumerate(((context, fit), (region, scale), (rebuilt, scale))):
        wide, high = shown.shape[1] * inches, shown.shape[0] * inches * example.stretch
        x = EDGE + i * (column + GAP) + (column - wide) / 2
        axes = place(figure, x, bottom + (row - high) / 2, wide, high)
        axes.imshow(shown, interpolation="nearest", aspect="auto", vmin=0, vmax=255)
        for spine in axes.spines.values():
            spine.set(linewidth=0.4, color="0.5")
        for x0, y0, x1, y1 in example.boxes if i == 0 else ():
            corner = x0 - 0.5 - around[2], y0 - 0.5 - around[0]
            style = {"fill": masked, "facecolor": "black", "edgecolor": COLOURS[1], "lw": 1.0}
            axes.add_patch(Rectangle(corner, x1 - x0, y1 - y0, **style))


def _around(cut: Cut, shape: tuple[int, int], stretch: float, size: tuple[float, float]) -> Cut:
    """(top, bottom, left, right) of the page around a region, in the proportions of the space for it."""
    top, bottom, left, right = cut
    column, row = size
    # The region takes at most 4/5 of the width and 3/5 of the height, and a third of the page's width is in sight.
    pixel = min(column / (1.25 * (right - left)), row / (1.6 * (bottom - top) * stretch), 3 * column / shape[1])
    wide, high = min(round(column / pixel), shape[1]), min(round(row / (pixel * stretch)), shape[0])
    x = min(max(0, (left + right - wide) // 2), shape[1] - wide)
    y = min(max(0, (top + bottom - high) // 2), shape[0] - high)
    return y, y + high, x, x + wide


def basename(name: str, length: int) -> str:
    """The last part of a path, for a figure."""
    return shorten(name.rstrip("/").rsplit("/", 1)[-1], length)


def colour_limit(pages: Sequence[ErrorMap]) -> float:
    """Where the colours of error maps end, so that those of several pages can be compared by eye."""
    error = np.concatenate([page.error.ravel() for page in pages])
    # On a large page a few cells far above the rest must not make the rest one colour.
    return float(np.nanpercentile(error, 98) if error.size >= 200 else np.nanmax(error))


def save_map(page: ErrorMap, path: str | Path, masked: bool = False, limit: float | None = None) -> Path:
    """Draw a page, its reconstruction and the error of each cell on the same grid, as .png or .pdf.

    `masked`: each region was blacked out while it was rebuilt; `limit`: the error at the upper end of the colours.
    """
    limit = colour_limit([page]) if limit is None else limit
    Rectangle = optional("matplotlib.patches").Rectangle
    rows, columns = page.error.shape
    bar, head, foot = 0.75, 0.66, 0.42
    aspect = rows * page.stretch / columns
    wide = min((WIDTH - 2 * EDGE - 2 * GAP - bar) / 3, 6.0 / aspect)
    high = wide * aspect
    height = high + head + foot
    needed = 3 * wide + 2 * GAP + 2 * EDGE + bar
    width = max(needed, 5.0)  # a narrow page must not cut its own titles
    left = EDGE + (width - needed) / 2
    figure = optional("matplotlib.figure").Figure(figsize=(width, height))
    heat = np.ma.masked_invalid(page.error)
    extent = (0, columns * page.cell, rows * page.cell, 0)
    shown: Any = None
    for title, pixels in (("page", page.original), ("reconstruction", page.rebuilt), ("error of each token", heat)):
        axes = place(figure, left, foot, wide, high)
        colours = {"cmap": "viridis", "vmin": 0, "vmax": limit} if pixels is heat else {}
        shown = axes.imshow(pixels, extent=extent, interpolation="nearest", aspect="auto", **colours)
        axes.set_title(title, fontsize=TITLE if wide > 1.3 else LABEL - 1, pad=4)
        left += wide + GAP
    axes.set_facecolor("0.8")
    for x0, y0, x1, y1 in page.boxes:
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="white", lw=0.5))
    scale = figure.colorbar(
        shown,
        cax=figure.add_axes((left / width, foot / height, 0.12 / width, high / height)),
        extend="max" if np.nanmax(page.error) > limit else "neither",
    )
    scale.set_label(MSE_LABEL, fontsize=LABEL)
    scale.ax.tick_params(labelsize=LABEL - 1)
    outside = "" if page.outside_mse is None else f", elsewhere (not trained on) {page.outside_mse:.3f}"
    title = f"{basename(page.id, 48)}\nmean MSE: cells with text {page.inside_mse:.3f}{outside}"
    figure.suptitle(title, fontsize=TITLE, y=1 - 0.08 / height, va="top", parse_math=False)
    share = min(1.0, page.spoken.sum() / max(1, page.text.sum()))
    note = (
        f"white: text boxes; rebuilt piece by piece, {share:.0%} of text cells with their text before them,\n"
        "the rest without text; the probe was trained on text regions"
        + (", each blacked out while it was rebuilt" if masked else "")
    )
    figure.text(0.5, 0.06 / height, note, ha="center", va="bottom", fontsize=LABEL - 1.5, color="0.3")
    return save(figure, path)


def half_variance(result: RProbeResult) -> float | None:
    """Training MSE at which the training FVU is 0.5; None where the run did not record its training FVU."""
    share = result.facts.get("train_fvu")
    return None if not share else 0.5 * result.running[-1] / share


def draw_curve(axes: Any, result: RProbeResult) -> None:
    """One run: training loss, its running mean, held-out value, constant baseline, threshold and FVU 0.5."""
    steps = np.arange(1, len(result.losses) + 1)
    axes.plot(steps, result.losses, color="0.8", linewidth=0.7, label="training batch")
    axes.plot(steps, result.running, color=COLOURS[0], linewidth=1.4, label="running mean")
    label = f"held-out {result.mse:.3f}"
    if result.mse_interval is not None:
        axes.axhspan(*result.mse_interval, color=COLOURS[2], alpha=0.15, linewidth=0)
        label += "\n(95 %: {:.3f} to {:.3f})".format(*result.mse_interval)
    _level(axes, result.mse, label, COLOURS[2], "-.", 1.2)
    _level(axes, result.constant_mse, f"constant patch {result.constant_mse:.3f}", "0.35", ":", 1.2)
    if (half := half_variance(result)) is not None:
        _level(axes, half, f"training FVU 0.5 ({half:.3f})", COLOURS[3], (0, (1, 1)), 1.2)
    top = HEADROOM * max(*result.losses, result.mse, result.constant_mse)
    vacuous = " (vacuous)" if result.threshold_is_vacuous else ""
    _level(axes, result.threshold, f"threshold {result.threshold:g}{vacuous}", COLOURS[1], "--", 1.0, top)
    masked = "region blacked out" if result.settings["masked"] else "full image"
    text = "with text" if result.settings["text"] else "without text"
    title = f"{masked}, {text}: held-out MSE {result.mse:.3f}{result.parts()},\n"
    title += f"FVU {result.fvu:.3f}, PSNR {result.psnr:.1f} dB\n{result.caveat()}"
    _finish(axes, title.rstrip(), top, len(steps))


def _level(axes: Any, value: float, label: str, color: str, style: Any, width: float, top: float = math.inf) -> None:
    """A level across the curves; above `top` it would flatten them, so that only the legend says that it is there."""
    if value <= top:
        axes.axhline(value, label=label, color=color, linestyle=style, linewidth=width)
    else:
        axes.plot([], [], label=f"{label}, off scale", color=color, linestyle=style, linewidth=width)


def plain_name(name: str, length: int = 28) -> str:
    """A name as figures show it: its end, without what matplotlib takes for mathematics."""
    return shorten(name, length).replace("$", r"\$")


def draw_curves(axes: Any, results: Mapping[str, RProbeResult]) -> None:
    """Several runs: their running training MSE, with constant patch and threshold."""
    longest = max(len(result.running) for result in results.values())
    top = HEADROOM * max(max(result.constant_mse, *result.running) for result in results.values())
    for i, (name, result) in enumerate(results.items()):
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
        axes.plot(range(1, len(result.running) + 1), result.running, linewidth=1.3, label=plain_name(name), **style)
    first = next(iter(results.values()))
    vacuous = sum(result.threshold_is_vacuous for result in results.values())
    label = f"threshold {first.threshold:g}"
    if vacuous:
        label += " (vacuous)" if vacuous == len(results) else f" (vacuous for {vacuous} of {len(results)})"
    _level(axes, first.threshold, label, "0.35", "--", 0.9, top)
    if len({round(result.constant_mse, 6) for result in results.values()}) == 1:
        _level(axes, first.constant_mse, f"constant patch {first.constant_mse:.3f}", "0.35", ":", 1.0)
    _finish(axes, "running training MSE", top, longest)


def draw_intervals(
    axes: Any, names: Sequence[str], values: Sequence[tuple[float, float | None, float | None] | None], title: str
) -> None:
    """Values, each (value, low, high), with the intervals that they have, in the colours of `draw_curves`."""
    for i, value in enumerate(values):
        if value is not None:
            color = COLOURS[i % len(COLOURS)]
            middle, low, high = value
            if low is not None and high is not None:
                axes.plot([low, high], [i, i], color=color, linewidth=1.4)
            axes.plot(middle, i, "o", color=color, markersize=4)
    axes.set_yticks(range(len(names)), [plain_name(name) for name in names], fontsize=FONT - 1)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(title, fontsize=FONT)
    _plain(axes, "x")


def _finish(axes: Any, title: str, top: float, right: float) -> None:
    axes.set(ylim=(0, top), xlim=(0, right))
    axes.set_xlabel("optimiser step", fontsize=FONT)
    axes.set_ylabel(MSE_LABEL, fontsize=FONT)
    axes.set_title(title, fontsize=FONT + 1)
    _plain(axes, "both")
    axes.legend(fontsize=FONT - 1, loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, borderaxespad=0)


def _plain(axes: Any, grid: str) -> None:
    axes.tick_params(labelsize=FONT - 1)
    axes.grid(axis=grid, alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def draw_correlations(found: Sequence["Correlation"], label: str) -> Any:
    """A small panel a benchmark; a legend names the points, because names beside them would cover one another."""
    names = list(dict.fromkeys(name for one in found for name, _, _ in one.points))
    # Colours come round again with another marker.
    styles = {
        name: {"marker": marker, "color": color, "markersize": 4.5, "linestyle": "none"}
        for name, (marker, color) in zip(names, itertools.cycle(itertools.product(MARKERS, COLOURS)), strict=False)
    }
    columns = min(3, len(found))
    rows = math.ceil(len(found) / columns)
    size = max(4.0, 2.5 * columns), 2.4 * rows + 0.4 + 0.17 * math.ceil(len(names) / 2)
    picture = optional("matplotlib.figure").Figure(figsize=size, layout="constrained")
    axes = picture.subplots(rows, columns, squeeze=False).reshape(-1)
    for axis in axes[len(found) :]:
        axis.remove()
    for axis, one in zip(axes, found, strict=False):
        _panel(axis, one, styles)
        axis.set_xlabel(label, fontsize=7)
    points = [axes[0].plot([], [], **style)[0] for style in styles.values()]
    shown = [plain_name(name, 44) for name in names]
    picture.legend(points, shown, loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    return picture


def _panel(axis: Any, one: "Correlation", styles: Mapping[str, Any]) -> None:
    finite = [value for _, value, _ in one.points if math.isfinite(value)]
    # What was never reached stands past the largest value.
    never = 1.15 * max(finite, default=1.0)
    for name, value, score in one.points:
        axis.plot(value if math.isfinite(value) else never, score, **styles[name])
    rho = "no rank" if one.spearman is None else f"$\\rho$ = {one.spearman:+.2f}, n = {one.n}"
    axis.set_title(one.task.replace("$", r"\$") + f"\n{rho}", fontsize=8)
    better = {True: "(higher is better)", False: "(lower is better)", None: ""}[one.higher_is_better]
    axis.set_ylabel(f"{one.metric}\n{better}".rstrip(), fontsize=7, parse_math=False)
    axis.tick_params(labelsize=6.5)
    axis.locator_params(axis="x", nbins=5)
    axis.margins(0.15, 0.15)
    axis.grid(alpha=0.25, linewidth=0.5)
    if len(finite) < len(one.points):
        axis.axvline(never, color="0.6", linewidth=0.7, linestyle=":")
        axis.text(never, 1.0, "never", fontsize=6, ha="right", va="top", transform=axis.get_xaxis_transform())
