"""The panel: original || checkpoint A || B || ..., one row an image, on white."""

import math
import re
from pathlib import Path

from llava_patch.core import plotting
from llava_patch.core.extras import optional
from llava_patch.measurements.attention_maps import maths
from llava_patch.measurements.attention_maps.result import WHOLE, AttentionMapsResult, View

CELL, HEAD = 1.35, 0.75  # inches: side of a picture, and what titles and the bar take
COLOURS = "viridis"


def attention_maps_figure(result: AttentionMapsResult, path: str | Path) -> Path:
    """Draw the images that have views; an original stands before each checkpoint that sees the images otherwise."""
    mpl = optional("matplotlib")
    Figure = optional("matplotlib.figure").Figure

    columns = _columns(result)
    rows = min(len(result.images), *(len(one.views) for one in result.checkpoints))
    height, width = result.checkpoints[0].views[0].pixels.shape[:2]
    side = CELL * height / width
    with mpl.rc_context(plotting.STYLE):
        figure = Figure(figsize=(CELL * len(columns) + 0.75, side * rows + HEAD), layout="constrained", facecolor="w")
        axes = figure.subplots(rows, len(columns), squeeze=False)
        for row in range(rows):
            for axis, (number, drawn) in zip(axes[row], columns, strict=True):
                one = result.checkpoints[number]
                view = one.views[row]
                if drawn:
                    scores = one.scores(row)
                    heat = maths.nearest(maths.min_max(scores), view.patch)
                    picture = axis.imshow(heat.numpy(), cmap=COLOURS, vmin=0, vmax=1, interpolation="nearest")
                    effective = f"{math.exp(maths.entropy(scores)):.1f} of {scores.numel()}"
                    axis.set_xlabel(effective, fontsize=6, labelpad=2)  # no wider than a map: the title has the unit
                else:
                    axis.imshow(view.pixels, interpolation="nearest")
                if row == 0:
                    original = f"original ({one.checkpoint})" if number else "original"
                    axis.set_title(_short(one.checkpoint if drawn else original), fontsize=7.5)
                axis.set(xticks=[], yticks=[])
                axis.grid(visible=False)
                for spine in axis.spines.values():  # a white page on white needs a border
                    spine.set(color="0.8", linewidth=0.5)
        bar = figure.colorbar(picture, ax=list(axes[:, -1]), shrink=0.8 if rows == 1 else 0.5, aspect=20)
        bar.set_label("attention, min-max of each map", fontsize=6.5)
        bar.ax.tick_params(labelsize=6.5)
        figure.suptitle(_title(result), fontsize=8)
    return plotting.write_figure(figure, path)


def _columns(result: AttentionMapsResult) -> list[tuple[int, bool]]:
    """(checkpoint, whether it is a map) of each column."""
    columns: list[tuple[int, bool]] = []
    shown: list[View] | None = None
    for number, one in enumerate(result.checkpoints):
        if shown is None or not all(map(_same, shown, one.views)):
            columns.append((number, False))
            shown = one.views
        columns.append((number, True))
    return columns


def _same(one: View, other: View) -> bool:
    """Up to one step of 8 bits."""
    pair = one.pixels.astype("int16"), other.pixels.astype("int16")
    return pair[0].shape == pair[1].shape and int(abs(pair[0] - pair[1]).max()) <= 1


def _title(result: AttentionMapsResult) -> str:
    kinds = list(dict.fromkeys(one.query for one in result.checkpoints))
    parts = [part for part in dict.fromkeys(one.part for one in result.checkpoints) if part != WHOLE]
    blocks = ", ".join(dict.fromkeys(f"{one.block} of {one.n_blocks}" for one in result.checkpoints))
    who = " / ".join(kinds) + "".join(f", {part}" for part in parts)
    return f"Attention of ViT block {blocks} ({who})\nbelow each map: its effective number of patches"


def _short(name: str) -> str:
    """A long name in lines of at most 18 letters, cut behind the first separator from the 12th on if there is one."""
    return "\n".join(re.findall(r".{11,17}?[-_/. ]|.{18}|.+", name))
