"""Loss curves: of one run with its baselines, or of several runs together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llava_patch.probe.result import RProbeResult

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
    title = f"{masked}, {text}: held-out FVU {result.fvu:.3f}{result.parts()}, PSNR {result.psnr:.1f} dB{caveat}"
    _finish(axes, title, top, len(steps))


def draw_curves(axes: Any, results: Mapping[str, RProbeResult]) -> None:
    """Several runs: running means in one panel, each with its held-out MSE and interval at the right edge."""
    longest = max(len(result.running) for result in results.values())
    top = 0.0
    for i, (name, result) in enumerate(results.items()):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        steps = np.arange(1, len(result.running) + 1)
        shown = name if len(name) <= 28 else "…" + name[-27:]
        axes.plot(steps, result.running, color=colour, linestyle=dash, linewidth=1.3, label=shown.replace("$", r"\$"))
        # Held-out values stand beside one another past the last step, so that their bars do not hide each other.
        x = longest * (1.03 + 0.03 * i)
        low, high = result.mse_interval or (result.mse, result.mse)
        axes.errorbar(
            [x], [result.mse], [[max(0.0, result.mse - low)], [max(0.0, high - result.mse)]],
            fmt="o", color=colour, markersize=3, capsize=2, linewidth=1.0,
        )  # fmt: skip
        top = max(top, high, result.constant_mse, *result.running)
    first = next(iter(results.values()))
    if first.threshold <= HEADROOM * top:
        axes.axhline(
            first.threshold, color="0.35", linestyle="--", linewidth=0.9, label=f"threshold {first.threshold:g}"
        )
    constants = {round(result.constant_mse, 6) for result in results.values()}
    if len(constants) == 1:
        axes.axhline(
            first.constant_mse,
            color="0.35",
            linestyle=":",
            linewidth=1.0,
            label=f"constant patch {first.constant_mse:.3f}",
        )
    axes.plot([], [], "o", color="0.35", markersize=3, label="held-out MSE, 95 %")
    _finish(
        axes,
        "running training MSE, and held-out MSE at the right",
        HEADROOM * top,
        longest * (1.05 + 0.03 * len(results)),
    )


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
