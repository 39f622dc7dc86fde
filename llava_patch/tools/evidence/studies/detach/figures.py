"""Figures of the study: predicted against measured, the arms' losses, strides and detached taps."""

from typing import Any

import numpy as np

from llava_patch.core.plotting import IMAGE, OTHER, SPLIT, TEXT, panels
from llava_patch.tools.evidence import statistics
from llava_patch.tools.evidence.findings import Found
from llava_patch.tools.evidence.studies.detach.cells import Cells, by_seed

ARMS = {"none": OTHER, "fused": IMAGE, "detached": TEXT, "short": SPLIT}
LABELS = {"none": "no taps", "fused": "attached", "detached": "detached", "short": "attached, shorter step"}
NEAREST = 1e-5  # gains below it are drawn linearly


def figures(found: Found) -> dict[str, Any]:
    """Those whose runs were done."""
    cells = by_seed(found)
    drawn = {"steps": _steps(cells)} if cells else {}
    places = [(p, o) for p in ("trained", "fresh") for o in ("sgd", "adamw") if f"arm/{p}/{o}/fused" in found]
    if places:
        drawn["arms"] = _arms(found, places)
    bubbles = {name.removeprefix("bubble/"): found[name] for name in _names(found, "bubble/")}
    if bubbles:
        alike = {"2-0": "arm/fresh/adamw/fused", "2-3": "arm/fresh/adamw/detached"}
        drawn["bubbles"] = _bubbles(
            {**bubbles, **{place: found[name] for place, name in alike.items() if name in found}}
        )
    return drawn


def _names(found: Found, prefix: str) -> list[str]:
    """Names of this study's runs that begin so."""
    whole = f"{found.study}/{prefix}"
    return [name.removeprefix(f"{found.study}/") for name in found if name.startswith(whole) and found.results[name]]


def _steps(seeds: list[Cells]) -> Any:
    figure, axes = panels(1, 3)
    rules = {"condition (7)": "predicted gain by (7), measured L", "variance dominance": "log c", "cosine": "-cosine"}
    for axis, (rule, label) in zip(axes, rules.items(), strict=True):
        for cells in seeds:
            for within, color in ((True, TEXT), (False, IMAGE)):
                here = cells.clear & (cells.within == within)
                axis.plot(cells.rules[rule][here], cells.gain[here], "o", ms=2.5, color=color, alpha=0.7)
        axis.axhline(0, color="0.5", lw=0.8)
        axis.axvline(0, color="0.5", lw=0.8)
        axis.set_yscale("symlog", linthresh=NEAREST)
        axis.set(xlabel=label, ylabel="measured gain of detaching")
    axes[0].set_xscale("symlog", linthresh=NEAREST)
    for axis in axes[:1]:
        axis.plot([], [], "o", color=TEXT, ms=3, label=r"$L\gamma < 1$")
        axis.plot([], [], "o", color=IMAGE, ms=3, label=r"$L\gamma \geq 1$")
        axis.legend()
        for edge in (axis.get_xaxis(), axis.get_yaxis()):
            edge.set_ticks([-1.0, -1e-2, -1e-4, 0, 1e-4, 1e-2, 1.0])
    figure.suptitle("One plain step of the tower: right sign in the upper right and the lower left", fontsize=8.5)
    return figure


def _arms(found: Found, places: list[tuple[str, str]]) -> Any:
    figure, axes = panels(-(-len(places) // 2), 2)
    for axis, (projector, optimizer) in zip(axes, places, strict=False):
        for arm, color in ARMS.items():
            if f"arm/{projector}/{optimizer}/{arm}" not in found:
                continue
            curves = [one["curve"] for one in found[f"arm/{projector}/{optimizer}/{arm}"]]
            for curve in curves:
                axis.plot(*zip(*curve, strict=True), color=color, lw=0.7, alpha=0.5)
            middle = np.mean([[loss for _, loss in curve] for curve in curves], 0)
            axis.plot([step for step, _ in curves[0]], middle, color=color, label=LABELS[arm])
        axis.set(xlabel="step", ylabel="loss on images not trained on", yscale="log")
        axis.set_title(f"{projector} projector, {'plain SGD' if optimizer == 'sgd' else 'AdamW'} in the tower")
        axis.axvspan(0, 40, color="0.5", alpha=0.08, lw=0)
    axes[0].legend()
    return figure


def _bubbles(runs: dict[str, list[dict[str, Any]]]) -> Any:
    figure, (axis,) = panels()
    for name, seeds in runs.items():
        stride, detached = map(int, name.split("-"))
        share = float(np.mean([statistics.share(one["rows"]) for one in seeds]))
        axis.scatter(stride, detached, s=30 + 900 * share**2, color=TEXT, alpha=0.5, lw=0)
        axis.annotate(f"{share:.2f}", (stride, detached), ha="center", va="center", fontsize=6.5)
    axis.set(xlabel="stride S", ylabel="detached taps D", title="Share of strings read (size and number)")
    axis.margins(0.25)
    axis.xaxis.set_major_locator(_whole())
    axis.yaxis.set_major_locator(_whole())
    return figure


def _whole() -> Any:
    from llava_patch.core.extras import optional

    return optional("matplotlib.ticker").MaxNLocator(integer=True)
