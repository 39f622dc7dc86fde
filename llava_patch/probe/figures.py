"""One figure a run: what was on the image, what the probe made of it, and how the loss fell."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_patch.errors import InputError
from llava_patch.files import atomic
from llava_patch.probe.result import Reconstruction, RProbeResult

BLANK = 235  # grey of what is not under a target token


def save_figure(result: RProbeResult, path: str | Path, documents: Sequence[str] | None = None) -> Path:
    """Draw original, region and reconstruction of held-out samples and the loss curve with its threshold, as PNG.

    Args:
        result: what `run_rprobe` returned.
        path: ends in .png; the file appears complete or not at all.
        documents: ids of samples to show; None: all examples that the run kept.

    Raises:
        InputError: an id that is not among the run's examples.
    """
    examples = list(result.examples)
    if documents is not None:
        known = {example.id: example for example in examples}
        unknown = [name for name in documents if name not in known]
        if unknown:
            raise InputError(f"no example {', '.join(unknown)}: this run kept {', '.join(known) or 'none'}")
        examples = [known[name] for name in documents]
    figure = _draw(result, examples)
    path = Path(path)
    with atomic(path) as part:
        figure.savefig(part, format="png", dpi=130)
    return path


def _draw(result: RProbeResult, examples: list[Reconstruction]) -> Any:
    # matplotlib is imported late: runs without figures do not need it, and no global backend is touched.
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows = len(examples)
    figure = Figure(figsize=(7.5, 1.9 * rows + 2.8), layout="constrained")
    grid = figure.add_gridspec(rows + 1, 3, height_ratios=[1.9] * rows + [2.6])
    for row, example in enumerate(examples):
        ys, xs = np.nonzero(example.target)
        cut = slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1)
        hidden = ~example.target[cut]
        region, rebuilt = example.original[cut].copy(), example.rebuilt[cut].copy()
        region[hidden] = rebuilt[hidden] = BLANK
        pictures = (("original", example.original), ("region", region), (f"rebuilt, MSE {example.mse:.3f}", rebuilt))
        for column, (title, picture) in enumerate(pictures):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(picture, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(title, fontsize=8)
            if column == 0:
                for x0, y0, x1, y1 in example.boxes:
                    axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, color="tab:red"))
                label = textwrap.shorten(example.text, 24, placeholder="…").replace("$", r"\$")
                axes.set_ylabel(f"{example.id[-24:]}\n{label}", fontsize=6)
    axes = figure.add_subplot(grid[rows, :])
    steps = np.arange(1, len(result.losses) + 1)
    axes.plot(steps, result.losses, color="0.8", linewidth=0.8, label="training MSE")
    axes.plot(steps, result.running, color="tab:blue", label="running mean")
    axes.axhline(result.mse, color="tab:green", linestyle="-.", label=f"held-out {result.mse:.3f}")
    axes.axhline(result.constant_mse, color="0.4", linestyle=":", label=f"constant patch {result.constant_mse:.3f}")
    vacuous = " (vacuous)" if result.threshold_is_vacuous else ""
    axes.axhline(
        result.threshold, color="tab:red", linestyle="--", linewidth=1, label=f"threshold {result.threshold:g}{vacuous}"
    )
    axes.set_xlabel("step")
    axes.set_ylabel("per-token MSE")
    # A vacuous threshold may lie far above: it must not flatten the curve.
    axes.set_ylim(0, 1.1 * max(*result.losses, result.mse, result.constant_mse))
    axes.legend(fontsize=7)
    masked = "masked" if result.settings["masked"] else "full"
    text = "with text" if result.settings["text"] else "without text"
    axes.set_title(f"{masked} image, {text}: FVU {result.fvu:.3f}, PSNR {result.psnr:.1f} dB", fontsize=9)
    return figure
