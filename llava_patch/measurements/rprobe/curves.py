"""Loss curves: of one run with its baselines, or of several runs together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llava_patch.measurements.rprobe.result import RProbeResult

# Okabe and Ito's colours, told apart by colour-blind readers; dashes tell a second round of them apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", "--", ":", "-.")
FONT = 8.0
HEADROOM = 1.15


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
        low, high = result.mse_interval
        label += f"\n(95 %: {low:.3f} to {high:.3f})"
    axes.axhline(result.mse, color=COLOURS[2], linestyle="-.", linewidth=1.2, label=label)
    axes.axhline(
        result.constant_mse,
        color="0.35",
        linestyle=":",
        linewidth=1.2,
        label=f"constant patch {result.constant_mse:.3f}",
    )
    half = half_variance(result)
    if half is not None:
        axes.axhline(
            half, color=COLOURS[3], linestyle=(0, (1, 1)), linewidth=1.2, label=f"training FVU 0.5 ({half:.3f})"
        )
    top = HEADROOM * max(*result.losses, result.mse, result.constant_mse)
    vacuous = " (vacuous)" if result.threshold_is_vacuous else ""
    if result.threshold <= top:
        axes.axhline(
            result.threshold,
            color=COLOURS[1],
            linestyle="--",
            linewidth=1.0,
            label=f"threshold {result.threshold:g}{vacuous}",
        )
    else:
        # It must not flatten the curve; the legend says that it is there.
        axes.plot([], [], color=COLOURS[1], linestyle="--", label=f"threshold {result.threshold:g}{vacuous}, off scale")
    masked = "region blacked out" if result.settings["masked"] else "full image"
    text = "with text" if result.settings["text"] else "without text"
    caveat = f"\n{result.caveat()}" if result.caveat() else ""
    title = (
        f"{masked}, {text}: held-out MSE {result.mse:.3f}{result.parts()},\n"
        f"FVU {result.fvu:.3f}, PSNR {result.psnr:.1f} dB{caveat}"
    )
    _finish(axes, title, top, len(steps))


def short(name: str) -> str:
    """A name as figures show it: its end, without what matplotlib takes for mathematics."""
    return (name if len(name) <= 28 else "…" + name[-27:]).replace("$", r"\$")


def _line(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}


def draw_curves(axes: Any, results: Mapping[str, RProbeResult]) -> None:
    """Several runs: their running training MSE, with constant patch and threshold."""
    longest = max(len(result.running) for result in results.values())
    top = max(max(result.constant_mse, *result.running) for result in results.values())
    for i, (name, result) in enumerate(results.items()):
        steps = np.arange(1, len(result.running) + 1)
        axes.plot(steps, result.running, linewidth=1.3, label=short(name), **_line(i))
    first = next(iter(results.values()))
    vacuous = sum(result.threshold_is_vacuous for result in results.values())
    label = f"threshold {first.threshold:g}"
    if vacuous:
        label += " (vacuous)" if vacuous == len(results) else f" (vacuous for {vacuous} of {len(results)})"
    style: dict[str, Any] = {"color": "0.35", "linestyle": "--", "linewidth": 0.9}
    if first.threshold <= HEADROOM * top:
        axes.axhline(first.threshold, label=label, **style)
    else:
        axes.plot([], [], label=f"{label}, off scale", **style)
    constants = {round(result.constant_mse, 6) for result in results.values()}
    if len(constants) == 1:
        axes.axhline(
            first.constant_mse,
            color="0.35",
            linestyle=":",
            linewidth=1.0,
            label=f"constant patch {first.constant_mse:.3f}",
        )
    _finish(axes, "running training MSE", HEADROOM * top, longest)


def draw_intervals(
    axes: Any,
    names: Sequence[str],
    values: Sequence[tuple[float, float | None, float | None] | None],
    title: str,
) -> None:
    """Values with their intervals, a line each, in the colours of `draw_curves`.

    Args:
        axes: of matplotlib.
        names: beside each line.
        values: (value, low, high); low and high may be None, and so may be the whole.
        title: of the axis.
    """
    for i, value in enumerate(values):
        if value is not None:
            middle, low, high = value
            if low is not None and high is not None:
                axes.plot([low, high], [i, i], color=_line(i)["color"], linewidth=1.4)
            axes.plot(middle, i, "o", color=_line(i)["color"], markersize=4)
    axes.set_yticks(range(len(names)), [short(name) for name in names], fontsize=FONT - 1)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(title, fontsize=FONT)
    axes.tick_params(labelsize=FONT - 1)
    axes.grid(axis="x", alpha=0.25, linewidth=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _finish(axes: Any, title: str, top: float, right: float) -> None:
    axes.set_ylim(0, top)
    axes.set_xlim(0, right)
    axes.set_xlabel("optimiser step", fontsize=FONT)
    axes.set_ylabel("MSE (normalised pixel values²)", fontsize=FONT)
    axes.tick_params(labelsize=FONT - 1)
    axes.set_title(title, fontsize=FONT + 1)
    axes.grid(alpha=0.25, linewidth=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=FONT - 1, loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, borderaxespad=0)
