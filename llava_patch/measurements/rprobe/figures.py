"""Figures of a run: held-out regions beside what the probe made of them, the loss curve, error maps; PNG and PDF."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_patch.core.errors import InputError, SettingError
from llava_patch.core.extras import optional
from llava_patch.core.files import atomic
from llava_patch.measurements.rprobe.curves import draw_curve
from llava_patch.measurements.rprobe.error_map import ErrorMap
from llava_patch.measurements.rprobe.result import Reconstruction, RProbeResult

FORMATS = ("png", "pdf")
DPI = 200
WIDTH = 7.0  # inches: the text width of a paper's page
TITLE, LABEL = 9.0, 8.0  # points
BLANK = 235  # grey of what is not under a target token
MARK = "#d55e00"  # colours are Okabe and Ito's, which colour-blind readers can tell apart
EDGE, GAP, HEAD, CAPTION, CURVE = 0.08, 0.1, 0.24, 0.2, 2.6  # inches
LOWEST, TALLEST = 0.5, 1.5  # inches of one row's pictures


def save_figure(result: RProbeResult, path: str | Path, documents: Sequence[str] | None = None) -> Path:
    """Draw original, region and reconstruction of held-out samples, and the loss curve with its baselines.

    Args:
        result: what `run_rprobe` returned.
        path: ends in .png or .pdf; the file appears complete or not at all.
        documents: ids of samples to show; None: all examples that the run kept.

    Raises:
        InputError: an id that is not among the run's examples.
        SettingError: another ending.
    """
    examples = list(result.examples)
    if documents is not None:
        known = {example.id: example for example in examples}
        unknown = [name for name in documents if name not in known]
        if unknown:
            raise InputError(f"no example {', '.join(unknown)}: this run kept {', '.join(known) or 'none'}")
        examples = [known[name] for name in documents]
    return save(_examples(result, examples), path)


def save_map(page: ErrorMap, path: str | Path, masked: bool = False, limit: float | None = None) -> Path:
    """Draw a page, its reconstruction and the error of each cell on the same grid.

    Args:
        page: one of `RProbeResult.maps`.
        path: as in `save_figure`.
        masked: whether each region was blacked out while it was rebuilt.
        limit: error at the upper end of the colours, the same for pages to be compared; None: `colour_limit`'s.
    """
    return save(_error_map(page, masked, colour_limit([page]) if limit is None else limit), path)


def colour_limit(pages: Sequence[ErrorMap]) -> float:
    """Where the colours of error maps end, so that those of several pages can be compared by eye."""
    error = np.concatenate([page.error.ravel() for page in pages])
    # On a large page a few cells far above the rest must not make the rest one colour.
    return float(np.nanpercentile(error, 98) if error.size >= 200 else np.nanmax(error))


def save(figure: Any, path: str | Path) -> Path:
    """Write a matplotlib figure atomically, in the format of the path's ending."""
    path = Path(path)
    suffix = path.suffix.lstrip(".").lower()
    if suffix not in FORMATS:
        raise SettingError(f"figure {path}: expected a name that ends in .{' or .'.join(FORMATS)}")
    # PDF carries the date of writing by default: the same run is to give the same file.
    extra = {"metadata": {"CreationDate": None}} if suffix == "pdf" else {}
    with atomic(path) as part:
        figure.savefig(part, format=suffix, dpi=DPI, **extra)
    return path


def _examples(result: RProbeResult, examples: list[Reconstruction]) -> Any:
    # matplotlib is imported late: runs without figures do not need it, and no global backend is touched.
    Figure = optional("matplotlib.figure").Figure

    column = (WIDTH - 2 * EDGE - 2 * GAP) / 3
    cuts = [_bounds(example.target) for example in examples]
    # Inches a processed pixel, so that a region fills its column or its row.
    scales = [
        min(column / (right - left), TALLEST / ((bottom - top) * e.stretch))
        for e, (top, bottom, left, right) in zip(examples, cuts, strict=True)
    ]
    heights = [
        max(LOWEST, (bottom - top) * e.stretch * scale)
        for e, (top, bottom, _, _), scale in zip(examples, cuts, scales, strict=True)
    ]
    height = (HEAD if examples else 0) + sum(h + CAPTION + GAP for h in heights) + CURVE
    figure = Figure(figsize=(WIDTH, height))
    top_edge = height
    if examples:
        masked = bool(result.settings["masked"])
        first = "tower's input, region blacked out" if masked else "tower's input, region outlined"
        for i, title in enumerate((first, "pixels under its tokens", "reconstruction")):
            x = EDGE + i * (column + GAP) + column / 2
            figure.text(x / WIDTH, 1 - 0.6 * HEAD / height, title, ha="center", va="center", fontsize=TITLE)
        top_edge -= HEAD
    for example, cut, scale, row in zip(examples, cuts, scales, heights, strict=True):
        figure.text(
            EDGE / WIDTH, (top_edge - 0.55 * CAPTION) / height, _caption(example), fontsize=LABEL, va="center",
            parse_math=False,
        )  # fmt: skip
        bottom = top_edge - CAPTION - row
        _row(figure, example, cut, scale, (column, row), bottom, height, bool(result.settings["masked"]))
        top_edge = bottom - GAP
    axes = figure.add_axes((0.6 / WIDTH, 0.45 / height, (WIDTH - 2.65) / WIDTH, (CURVE - 0.8) / height))
    draw_curve(axes, result)
    return figure


def _row(
    figure: Any,
    example: Reconstruction,
    cut: tuple[int, int, int, int],
    scale: float,
    size: tuple[float, float],
    bottom: float,
    total: float,
    masked: bool,
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
        y = bottom + (row - high) / 2
        axes = figure.add_axes((x / WIDTH, y / total, wide / WIDTH, high / total))
        axes.imshow(shown, interpolation="nearest", aspect="auto", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(linewidth=0.4, color="0.5")
        if i == 0:
            for x0, y0, x1, y1 in example.boxes:
                axes.add_patch(
                    Rectangle(
                        (x0 - 0.5 - around[2], y0 - 0.5 - around[0]),
                        x1 - x0,
                        y1 - y0,
                        fill=masked,
                        facecolor="black",
                        edgecolor=MARK,
                        lw=1.0,
                    )
                )


def _around(
    cut: tuple[int, int, int, int], shape: tuple[int, int], stretch: float, size: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the page around a region, in the proportions of the space for it."""
    top, bottom, left, right = cut
    column, row = size
    # The region takes at most 4/5 of the width and 3/5 of the height, and a third of the page's width is in sight.
    pixel = min(column / (1.25 * (right - left)), row / (1.6 * (bottom - top) * stretch), 3 * column / shape[1])
    wide, high = round(column / pixel), round(row / (pixel * stretch))
    wide, high = min(wide, shape[1]), min(high, shape[0])
    x = min(max(0, (left + right - wide) // 2), shape[1] - wide)
    y = min(max(0, (top + bottom - high) // 2), shape[0] - high)
    return y, y + high, x, x + wide


def _bounds(target: np.ndarray) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the pixels under target tokens."""
    ys, xs = np.nonzero(target)
    return int(ys.min()), int(ys.max()) + 1, int(xs.min()), int(xs.max()) + 1


def short(name: str, length: int) -> str:
    """A name for a figure: of a path its last part, at most so many characters of its end."""
    name = name.rstrip("/").rsplit("/", 1)[-1]
    return name if len(name) <= length else "…" + name[1 - length :]


def _caption(example: Reconstruction) -> str:
    name = short(example.id, 38)
    text = textwrap.shorten(example.text, 44, placeholder="…") or example.text[:43] + "…"
    return f"{name}: “{text}”   MSE {example.mse:.3f}, PSNR {example.psnr:.1f} dB"


def _error_map(page: ErrorMap, masked: bool, limit: float) -> Any:
    Figure = optional("matplotlib.figure").Figure
    Rectangle = optional("matplotlib.patches").Rectangle

    rows, columns = page.error.shape
    bar, head, foot = 0.75, 0.66, 0.42
    aspect = rows * page.stretch / columns
    wide = (WIDTH - 2 * EDGE - 2 * GAP - bar) / 3
    wide = min(wide, 6.0 / aspect)
    high = wide * aspect
    height = high + head + foot
    width = 3 * wide + 2 * GAP + 2 * EDGE + bar
    # A narrow page must not cut its own titles.
    shift = max(0.0, (5.0 - width) / 2)
    width = max(width, 5.0)
    figure = Figure(figsize=(width, height))
    heat = np.ma.masked_invalid(page.error)
    shown: Any = None
    for i, title in enumerate(("page", "reconstruction", "error of each token")):
        x = shift + EDGE + i * (wide + GAP)
        axes = figure.add_axes((x / width, foot / height, wide / width, high / height))
        extent = (0, columns * page.cell, rows * page.cell, 0)
        if i < 2:
            axes.imshow(
                page.original if i == 0 else page.rebuilt, extent=extent, interpolation="nearest", aspect="auto"
            )
        else:
            axes.set_facecolor("0.8")
            shown = axes.imshow(
                heat, extent=extent, interpolation="nearest", aspect="auto", cmap="viridis", vmin=0, vmax=limit
            )
            for x0, y0, x1, y1 in page.boxes:
                axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="white", lw=0.5))
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, fontsize=TITLE if wide > 1.3 else LABEL - 1, pad=4)
    x = shift + EDGE + 3 * (wide + GAP)
    colours = figure.colorbar(
        shown,
        cax=figure.add_axes((x / width, foot / height, 0.12 / width, high / height)),
        extend="max" if np.nanmax(page.error) > limit else "neither",
    )
    colours.set_label("MSE (normalised pixel values²)", fontsize=LABEL)
    colours.ax.tick_params(labelsize=LABEL - 1)
    outside = "" if page.outside_mse is None else f", elsewhere (not trained on) {page.outside_mse:.3f}"
    figure.suptitle(
        f"{short(page.id, 48)}\n"
        f"mean MSE: cells with text {page.inside_mse:.3f}{outside}",
        fontsize=TITLE, y=1 - 0.08 / height, va="top", parse_math=False,
    )  # fmt: skip
    share = page.spoken.sum() / max(1, page.text.sum())
    figure.text(
        0.5, 0.06 / height,
        f"white: text boxes; rebuilt piece by piece, {min(1.0, share):.0%} of text cells with their text before them,\n"
        "the rest without text; the probe was trained on text regions"
        + (", each blacked out while it was rebuilt" if masked else ""),
        ha="center", va="bottom", fontsize=LABEL - 1.5, color="0.3",
    )  # fmt: skip
    return figure
