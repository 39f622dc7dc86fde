"""Pictures and counts by which one sees whether boxes are right, before and after the image transform."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava_patch.errors import InputError, SettingError
from llava_patch.files import atomic
from llava_patch.probe.images import image_size
from llava_patch.probe.sample import Box, Sample
from llava_patch.probe.sequence import TokenGrid, target_mask
from llava_patch.probe.transform import Transform

RED, BLUE = "#d62728", "#1f77b4"
LONGEST = 1400  # pixels of an original that is drawn: more is not seen
WIDTHS = (2.1, 2.6, 2.8)  # inches of the three pictures of a row
ROW = 2.9  # inches


def clip_like(side: int, patch: int, mode: str) -> Transform:
    """The transform of a CLIP tower of that size, for a preview without a model.

    Args:
        side: of the tower's input, pixels.
        patch: side of a patch (of a token, where patches are merged), pixels.
        mode: one of `IMAGE_MODES` but "anyres".

    Raises:
        SettingError: patches that do not tile the side, or a mode that needs a model.
    """
    from transformers import CLIPImageProcessor

    if patch < 1 or side < patch or side % patch:
        raise SettingError(f"--size {side} --patch {patch}: expected a size that is a multiple of the patch")
    if mode == "anyres":
        raise SettingError("--image-mode anyres: the tiles are the model's own: add --model CHECKPOINT")
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return Transform(processor, mode, side, side, patch)


def choose(samples: Sequence[Sample], count: int, names: Sequence[str] = ()) -> list[Sample]:
    """Samples to show: those named by id or number (from 0), else `count` spread evenly over all.

    Raises:
        InputError: a name that none of them has.
    """
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
    """What there is, as (name, value): documents, regions, text lengths, heights in tokens.

    Args:
        samples: all of them; of their images only the headers are read, once each.
        transform: of the model that the heights are for.
    """
    sizes: dict[Any, tuple[int, int]] = {}
    heights, small, cut = [], 0, 0
    for sample in samples:
        key = sample.image if isinstance(sample.image, (str, Path)) else id(sample.image)
        if key not in sizes:
            sizes[key] = image_size(sample.image, sample.id)
        try:
            moved = [transform.box(box, sizes[key], sample.id) for box in sample.boxes]
        except InputError:  # the reader checked the boxes: this one is cut away
            cut += 1
            continue
        heights += [(y1 - y0) / transform.cell for _, y0, _, y1 in moved]
        small += sum(max(x1 - x0, y1 - y0) < transform.cell for x0, y0, x1, y1 in moved)
    lengths = [len(sample.text) for sample in samples]
    lines = [
        ("documents", f"{len({sample.document or sample.id for sample in samples}):,}"),
        ("samples", f"{len(samples):,}"),
        ("text length, characters", _range(lengths, "d")),
        ("region height, tokens", _range(heights, ".2f") if heights else "none left"),
        ("lower than a token", _share(sum(height < 1 for height in heights), len(heights))),
        ("smaller than a token in both", _share(small, len(heights))),
    ]
    if cut:
        lines.append((f"cut away by {transform.mode}", _share(cut, len(samples))))
    return lines


def _range(values: Sequence[float], form: str) -> str:
    middle = median(values)
    middle = int(middle) if form == "d" else middle
    return f"median {middle:{form}}, {min(values):{form}} to {max(values):{form}}"


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / max(whole, 1):.0%})"


def save_preview(samples: Sequence[Sample], transform: Transform, path: str | Path, title: str) -> Path:
    """Draw a row a sample, as PNG: the original with its boxes, what the tower sees, and the region enlarged.

    Args:
        samples: at least one.
        transform: to what the tower sees.
        path: ends in .png; the file appears complete or not at all.
        title: over the figure.

    Raises:
        InputError: an image that cannot be read, or no sample.
    """
    # matplotlib is imported late, and no global backend is touched.
    from matplotlib.figure import Figure

    if not samples:
        raise InputError("preview: there is no sample to show")
    rows = len(samples)
    figure = Figure(figsize=(sum(WIDTHS), ROW * rows + 0.55))
    top = 1 - 0.52 / (ROW * rows + 0.55)
    grid = figure.add_gridspec(
        rows, 3, width_ratios=WIDTHS, left=0.01, right=0.99, bottom=0.005, top=top - 0.26 / (ROW * rows), wspace=0.05,
        hspace=0.2,
    )  # fmt: skip
    title = title if len(title) <= 90 else f"…{title[-89:]}"
    figure.text(0.01, 1 - 0.06 / (ROW * rows + 0.55), title, fontsize=9, va="top", weight="bold")
    legend = "red: the region;  blue: other text boxes;  shaded: tokens that are the target"
    figure.text(0.01, 1 - 0.26 / (ROW * rows + 0.55), legend, fontsize=8, va="top", color="0.35")
    for row, sample in enumerate(samples):
        image = sample.open_image()
        axes = [figure.add_subplot(grid[row, column]) for column in range(3)]
        _draw_original(axes[0], sample, image)
        _draw_plane(axes[1], sample, image, transform)
        _draw_region(axes[2], sample, image)
        for one in axes:
            one.set_anchor("N")
            one.set_xticks([])
            one.set_yticks([])
            for spine in one.spines.values():
                spine.set(color="0.6", linewidth=0.5)
    path = Path(path)
    with atomic(path) as part:
        figure.savefig(part, format="png", dpi=150)
    return path


def _outline(axes: Any, boxes: Sequence[Box], color: str, width: float) -> None:
    from matplotlib.collections import PolyCollection

    corners = [[(x0, y0), (x1, y0), (x1, y1), (x0, y1)] for x0, y0, x1, y1 in boxes]
    axes.add_collection(PolyCollection(corners, facecolors="none", edgecolors=color, linewidths=width), autolim=False)


def _show(axes: Any, picture: Any, size: tuple[int, int], origin: tuple[float, float] = (0, 0)) -> None:
    """Draw so that coordinates are pixels, (0, 0) the upper left corner of the upper left pixel."""
    (left, top), (width, height) = origin, size
    axes.imshow(picture, extent=(left, left + width, top + height, top), interpolation="antialiased")
    axes.set_xlim(left, left + width)
    axes.set_ylim(top + height, top)


def _draw_original(axes: Any, sample: Sample, image: Image.Image) -> None:
    shown = image
    if max(image.size) > LONGEST:
        shown = image.copy()
        shown.thumbnail((LONGEST, LONGEST))
    _show(axes, shown, image.size)
    _outline(axes, [box for box in sample.all_boxes if box not in sample.boxes], BLUE, 0.5)
    _outline(axes, sample.boxes, RED, 1.4)
    axes.set_title(f"{_ending(sample.id)}\n{image.width} x {image.height} px", fontsize=8)


def _draw_plane(axes: Any, sample: Sample, image: Image.Image, transform: Transform) -> None:
    plane = transform.plane(image)
    mean, std = transform.statistics()
    pixels = (plane * std[:, None, None] + mean[:, None, None]).clamp(0, 1)
    height, width = pixels.shape[1:]
    _show(axes, (pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8), (width, height))
    grid = TokenGrid(height // transform.cell, width // transform.cell, transform.cell)
    for at in range(0, width + 1, grid.cell):
        axes.axvline(at, color="0.5", linewidth=0.25)
    for at in range(0, height + 1, grid.cell):
        axes.axhline(at, color="0.5", linewidth=0.25)
    try:
        moved = [transform.box(box, image.size, sample.id) for box in sample.boxes]
    except InputError:
        axes.set_title(f"{transform.mode} {width} x {height}:\nthe region is cut away", fontsize=8, color=RED)
        return
    target = target_mask(torch.tensor(moved, dtype=torch.float32), grid).any(0).reshape(grid.rows, grid.columns)
    shade = np.zeros((grid.rows, grid.columns, 4), np.float32)
    shade[target.numpy()] = (1.0, 0.75, 0.0, 0.45)
    axes.imshow(shade, extent=(0, width, height, 0), interpolation="nearest")
    _outline(axes, moved, RED, 1.0)
    axes.set_title(
        f"{transform.mode} {width} x {height}, tokens of {grid.cell} px:\n{int(target.sum())} of {grid.tokens} are the "
        "target",
        fontsize=8,
    )


def _draw_region(axes: Any, sample: Sample, image: Image.Image) -> None:
    x0, y0 = min(box[0] for box in sample.boxes), min(box[1] for box in sample.boxes)
    x1, y1 = max(box[2] for box in sample.boxes), max(box[3] for box in sample.boxes)
    margin = 0.35 * max(y1 - y0, 8) / max(len(sample.boxes) ** 0.5, 1)
    left, top = max(int(x0 - margin), 0), max(int(y0 - margin), 0)
    right, bottom = min(int(x1 + margin) + 1, image.width), min(int(y1 + margin) + 1, image.height)
    _show(axes, image.crop((left, top, right, bottom)), (right - left, bottom - top), (left, top))
    _outline(axes, sample.boxes, RED, 1.0)
    lines = [part for line in sample.text.split("\n") for part in textwrap.wrap(line, 40) or [""]]
    text = "\n".join([*lines[:2], f"… {len(sample.text)} characters"] if len(lines) > 3 else lines)
    axes.set_title(text.replace("$", r"\$"), fontsize=8, family=["DejaVu Sans"])


def _ending(name: str, length: int = 34) -> str:
    """The end of a sample's id: folders say little."""
    name = "/".join(name.split("/")[-2:])
    name = name if len(name) <= length else f"…{name[-length + 1 :]}"
    return name.replace("$", r"\$")
