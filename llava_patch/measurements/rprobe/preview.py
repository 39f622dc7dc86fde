"""Pictures and counts by which one sees whether boxes are right, before and after the image transform."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from llava_patch.core.errors import InputError, SettingError
from llava_patch.core.extras import optional
from llava_patch.core.plotting import shorten
from llava_patch.measurements.rprobe.figures import place, save
from llava_patch.probe.sample import Box, Sample, image_size
from llava_patch.probe.sequence import CHANNELS, patchify
from llava_patch.probe.transform import Plane, Transform, picture, square_transform
from llava_patch.probe.window import TEXT_HEIGHT, Window

RED, BLUE, GREEN = "#d62728", "#1f77b4", "#2ca02c"
LONGEST = 1400  # pixels of an original that is drawn: more is not seen
# Inches: of the figure, between pictures, of titles, and of a row's pictures.
WIDTH, EDGE, GAP, OVER, CAPTION = 7.6, 0.08, 0.12, 0.5, 0.5
HIGHEST, LOWEST, NARROWEST = 2.6, 0.8, 1.5
LETTER = 0.062  # inches of a title's letter, on average
DPI, LARGEST = 180, 60000  # dots an inch, and dots of the longest side that a PNG is drawn with
TALL = 2.6  # a page of more heights to its width is shown around the region only


def clip_like(side: int, patch: int, mode: str, text_height: float = TEXT_HEIGHT) -> Transform:
    """The transform of a CLIP tower of that size and patch (of a token, where patches are merged), without a model."""
    from transformers import CLIPImageProcessor

    if patch < 1 or side < patch or side % patch:
        raise SettingError(f"--size {side} --patch {patch}: expected a size that is a multiple of the patch")
    if mode == "anyres":
        raise SettingError("--image-mode anyres: the tiles are the model's own: add --model CHECKPOINT")
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return square_transform(processor, mode, side, side, patch, text_height)


def choose_shown(samples: Sequence[Sample], count: int, names: Sequence[str] = ()) -> list[Sample]:
    """Samples to show: those named by id or number (from 0), else `count` spread evenly over all."""
    if not names:
        count = min(count, len(samples))
        return [samples[(2 * i + 1) * len(samples) // (2 * count)] for i in range(count)]
    places = {sample.id: i for i, sample in enumerate(samples)}
    chosen = []
    for name in names:
        ends = [i for known, i in places.items() if known.endswith(f"/{name}")]
        if name in places:
            chosen.append(samples[places[name]])
        elif name.isdecimal() and int(name) < len(samples):
            chosen.append(samples[int(name)])
        elif len(ends) == 1:  # 003.csv:12 of /long/way/003.csv:12
            chosen.append(samples[ends[0]])
        else:
            raise InputError(f"no sample {name!r}: there are 0 to {len(samples) - 1}, such as {samples[0].id}")
    return chosen


def counts(samples: Sequence[Sample], transform: Transform) -> list[tuple[str, str]]:
    """What there is, as (name, value), heights in tokens of the transform's model. Of images only headers are read."""
    sizes: dict[Any, tuple[int, int]] = {}
    moved, cut, begun = [], 0, 0
    for sample in samples:
        key = sample.image if isinstance(sample.image, (str, Path)) else id(sample.image)
        if key not in sizes:
            sizes[key] = image_size(sample.image, sample.id)
        try:
            boxes, size = sample.boxes, sizes[key]
            if (window := transform.window_of(sample, size)) is not None:
                boxes = tuple(inside for box in boxes if (inside := window.moved(box)) is not None)
                size, begun = window.size, begun + (not window.whole)
            moved += [transform.box(box, size, sample.id) for box in boxes]
        except InputError:  # the reader checked the boxes: this one is cut away
            cut += 1
    heights = [(y1 - y0) / transform.cell for _, y0, _, y1 in moved]
    small = sum(max(x1 - x0, y1 - y0) < transform.cell for x0, y0, x1, y1 in moved)
    lengths = [len(sample.text) for sample in samples]
    tall = f"median {median(heights):.2f}, {min(heights):.2f} to {max(heights):.2f}" if heights else "none left"
    lines = [
        ("documents", f"{len({sample.document or sample.id for sample in samples}):,}"),
        ("samples", f"{len(samples):,}"),
        ("text length, characters", f"median {int(median(lengths))}, {min(lengths)} to {max(lengths)}"),
        ("region height, tokens", tall),
        ("lower than a token", _share(sum(height < 1 for height in heights), len(heights))),
        ("smaller than a token in both", _share(small, len(heights))),
    ]
    if transform.mode == "window":
        lines.append(("only the beginning in its window", _share(begun, len(samples))))
    if cut:
        lines.append((f"cut away by {transform.mode}", _share(cut, len(samples))))
    return lines


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / max(whole, 1):.0%})"


def save_preview(samples: Sequence[Sample], transform: Transform, path: str | Path, title: str) -> Path:
    """Draw a row a sample, as PNG: the original with its boxes, what the tower sees, and the region enlarged."""
    if not samples:
        raise InputError("preview: there is no sample to show")
    drawn = []
    for sample in samples:
        image, window = sample.open_image(), transform.window_of(sample)
        seen = sample if window is None else window.cut(sample)
        plane = Plane.of(transform, seen.open_image(), CHANNELS * transform.cell**2)
        cut = _around(sample, image)
        ratio = image.width / min(image.height, TALL * image.width)  # of an original as it is shown
        sides = ratio, plane.pixels.shape[-1] / plane.pixels.shape[-2], (cut[2] - cut[0]) / (cut[3] - cut[1])
        shown = (sample, image, window), (seen, plane), (sample, image, cut)
        drawn.append((shown, *_fit(sides)))
    height = OVER + sum(CAPTION + row for _, row, _ in drawn)
    # matplotlib is imported late, and no global backend is touched.
    figure = optional("matplotlib.figure").Figure(figsize=(WIDTH, height))
    x, style = EDGE / WIDTH, {"va": "top", "parse_math": False}
    figure.text(x, 1 - 0.06 / height, shorten(title, 100), fontsize=9, weight="bold", **style)
    legend = "red: the region;  blue: other text boxes;  shaded: tokens that are the target"
    legend += ";  green: the window" * (transform.mode == "window")
    figure.text(x, 1 - 0.26 / height, legend, fontsize=8, color="0.35", **style)
    top = height - OVER
    for shown, row, widths in drawn:
        left = EDGE
        draws: tuple[Callable[..., None], ...] = _draw_original, _draw_plane, _draw_region
        for draw, what, width in zip(draws, shown, widths, strict=True):
            axes = place(figure, left, top - CAPTION - row + EDGE, width, row)
            axes.set_anchor("NW")
            for spine in axes.spines.values():
                spine.set(color="0.6", linewidth=0.5)
            draw(axes, *what, int(width / LETTER))
            left += width + GAP
        top -= CAPTION + row
    return save(figure, path, min(DPI, LARGEST / height))


def _fit(ratios: Sequence[float]) -> tuple[float, list[float]]:
    """(height, widths) in inches of a row's pictures: as high as the width allows, so that little of it stays white."""
    space = WIDTH - 2 * EDGE - GAP * (len(ratios) - 1)
    # A long line of text would take all of the width; a narrow page needs some for its title.
    ratios = [min(ratio, 2.2) for ratio in ratios]
    height = HIGHEST
    while sum(max(NARROWEST, height * ratio) for ratio in ratios) > space and height > LOWEST:
        height -= 0.02
    widths = [max(NARROWEST, height * ratio) for ratio in ratios]
    widths[-1] = max(widths[-1], space - sum(widths[:-1]))  # for the text, which stands over it
    return height, widths


def _around(sample: Sample, image: Image.Image) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a sample's region with a margin, pixels."""
    lows = [min(box[axis] for box in sample.boxes) for axis in (0, 1)]
    highs = [max(box[axis] for box in sample.boxes) for axis in (2, 3)]
    margin = 0.35 * max(highs[1] - lows[1], 8) / max(len(sample.boxes) ** 0.5, 1)
    left, top = (max(int(low - margin), 0) for low in lows)
    right, bottom = (min(int(high + margin) + 1, limit) for high, limit in zip(highs, image.size, strict=True))
    return left, top, right, bottom


def _caption(axes: Any, lines: Sequence[str], letters: int, **style: Any) -> None:
    """Lines over a picture, from its left edge, at most as long as it is wide; three of them."""
    parts = [part for line in lines for part in textwrap.wrap(line, letters) or [""]]
    parts = parts if len(parts) <= 3 else [*parts[:2], "…"]
    axes.set_title("\n".join(parts), loc="left", fontsize=7, pad=3, parse_math=False, **style)


def _outline(axes: Any, boxes: Sequence[Box], color: str, width: float) -> None:
    PolyCollection = optional("matplotlib.collections").PolyCollection
    corners = [[(x0, y0), (x1, y0), (x1, y1), (x0, y1)] for x0, y0, x1, y1 in boxes]
    axes.add_collection(PolyCollection(corners, facecolors="none", edgecolors=color, linewidths=width), autolim=False)


def _show(axes: Any, shown: Any, size: tuple[int, int], origin: tuple[float, float] = (0, 0)) -> None:
    """Draw so that coordinates are pixels, (0, 0) the upper left corner of the upper left pixel."""
    (left, top), (width, height) = origin, size
    axes.imshow(shown, extent=(left, left + width, top + height, top), interpolation="antialiased")
    axes.set(xlim=(left, left + width), ylim=(top + height, top))


def _draw_original(axes: Any, sample: Sample, image: Image.Image, window: Window | None, letters: int) -> None:
    shown = image
    if max(image.size) > LONGEST and image.height <= TALL * image.width:
        shown = image.copy()
        shown.thumbnail((LONGEST, LONGEST))
    _show(axes, shown, image.size)
    _outline(axes, [box for box in sample.all_boxes if box not in sample.boxes], BLUE, 0.5)
    _outline(axes, sample.boxes, RED, 1.4)
    _outline(axes, [] if window is None else [window.box], GREEN, 1.0)
    note = ""
    tallest = round(TALL * image.width)
    if image.height > tallest:  # the whole of it would be a thread
        middle = (min(box[1] for box in sample.boxes) + max(box[3] for box in sample.boxes)) / 2
        top = round(min(max(middle - tallest / 2, 0), image.height - tallest))
        axes.set_ylim(top + tallest, top)
        note = f", rows {top} to {top + tallest}"
    name = shorten("/".join(sample.id.split("/")[-2:]), 2 * letters)
    parts = filter(None, (name[:letters], name[letters:]))
    _caption(axes, [*parts, f"{image.width} x {image.height} px{note}"], letters)


def _draw_plane(axes: Any, sample: Sample, plane: Plane, letters: int) -> None:
    (height, width), grid, mode = plane.pixels.shape[1:], plane.grid, plane.transform.mode
    _show(axes, picture(patchify(plane.pixels[None], grid), grid, plane.transform), (width, height))
    for at in range(0, width + 1, grid.cell):
        axes.axvline(at, color="0.5", linewidth=0.25)
    for at in range(0, height + 1, grid.cell):
        axes.axhline(at, color="0.5", linewidth=0.25)
    try:
        moved = [plane.box(box, sample.id) for box in sample.boxes]
    except InputError:
        _caption(axes, [f"{mode} {width} x {height}:", "the region is cut away"], letters, color=RED)
        return
    target = plane.cells(moved)
    shade = np.zeros((grid.tokens, 4), np.float32)
    shade[target.numpy()] = (1.0, 0.75, 0.0, 0.45)
    axes.imshow(shade.reshape(grid.rows, grid.columns, 4), extent=(0, width, height, 0), interpolation="nearest")
    _outline(axes, moved, RED, 1.0)
    size = [f"{mode} {width} x {height},", f"tokens of {grid.cell} px:"]
    _caption(axes, [*size, f"{int(target.sum())} of {grid.tokens} are the target"], letters)


def _draw_region(axes: Any, sample: Sample, image: Image.Image, cut: tuple[int, int, int, int], letters: int) -> None:
    left, top, right, bottom = cut
    _show(axes, image.crop(cut), (right - left, bottom - top), (left, top))
    _outline(axes, sample.boxes, RED, 1.0)
    lines = [part for line in sample.text.split("\n") for part in textwrap.wrap(line, letters) or [""]]
    shown = [*lines[:2], f"… {len(sample.text)} characters"] if len(lines) > 3 else lines
    _caption(axes, shown, letters, family=["DejaVu Sans"])
