"""The figure of the fusion attention measurement."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.core import plotting
from llava_patch.core.extras import optional

if TYPE_CHECKING:
    from llava_patch.measurements.fusion_attention.result import FusionAttentionResult

COLUMNS = 2
NUMBERED = 16  # up to so many heads, each one's number stands under it


def fusion_attention_figure(result: "FusionAttentionResult", path: str | Path) -> Path:
    """A panel a layer: each head's mass, sorted by stock's; trained as bars, stock as points, its double as dashes.

    Returns:
        The path written.
    """
    mpl = optional("matplotlib")

    count = len(result.layers)
    columns = min(COLUMNS, count)
    figure, axes = plotting.panels(-(-count // columns), columns)
    with mpl.rc_context(plotting.STYLE):
        for index, axis in enumerate(axes):
            if index < count:
                _panel(axis, result, index)
            else:
                axis.set_visible(False)
        figure.suptitle(f"Text-to-image attention by head, {result.samples} samples", fontsize=8.5)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        return plotting.write_figure(figure, path)


def _panel(axis: Any, result: "FusionAttentionResult", index: int) -> None:
    trained, stock = result.trained[index], result.stock[index]
    order = sorted(range(len(stock)), key=lambda head: stock[head], reverse=True)
    places = range(len(order))
    own, base = [trained[h] for h in order], [stock[h] for h in order]
    above = [a > 2 * b for a, b in zip(own, base, strict=True)]
    for wanted, color, label in ((False, "0.72", "trained"), (True, plotting.IMAGE, "trained, above twice stock")):
        heights = [mass if high is wanted else 0.0 for mass, high in zip(own, above, strict=True)]
        axis.bar(places, heights, color=color, width=0.8, label=label)
    axis.plot(places, base, "o", color=plotting.TEXT, ms=3, label="stock")
    left, right = [i - 0.4 for i in places], [i + 0.4 for i in places]
    axis.hlines([2 * b for b in base], left, right, color=plotting.TEXT, ls="--", lw=1.0, label="twice stock")
    ratio, heads = result.mean_ratio(index), len(order)
    where = f"layer {result.layers[index]} of 0..{result.n_layers - 1}"
    axis.set_title(f"{where}: mean x {ratio:.2f}, {sum(above)} of {heads} heads over twice", fontsize=7.5)
    if heads <= NUMBERED:
        axis.set_xticks(list(places), [str(h) for h in order])
        axis.set_xlabel("head number, sorted by stock's mass")
    else:
        axis.set_xlabel(f"{heads} heads, sorted by stock's mass")
    axis.set_xlim(-0.7, heads - 0.3)
    axis.set_ylim(0, 1.08 * max(*own, *base, 1e-9))  # twice stock may lie above, where nothing reaches it
    axis.set_ylabel("mass on image keys (probability)")
    axis.grid(visible=False, axis="x")
