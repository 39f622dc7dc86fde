"""Figures of the measurements."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.files import atomic

if TYPE_CHECKING:
    from llava_patch.diagnostics.saturation import SaturationResult

IMAGE, TEXT, SPLIT = "#c44e52", "#4c72b0", "#55a868"


def saturation_figure(result: "SaturationResult", path: str | Path) -> Path:
    """Three panels over the layers: cosine, attention mass, logit-lens KL; the recommended window is shaded.

    Returns:
        The path written.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display needed

    curves, layers = result.curves, range(result.n_layers)
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    cosine, mass, lens = figure.subplots(1, 3)

    cosine.plot(layers, curves.image_cosine, "o-", color=IMAGE, ms=3, label="image positions")
    cosine.plot(layers, curves.text_cosine, "o-", color=TEXT, ms=3, label="text positions")
    _describe(cosine, "How much a layer turns the states", "cosine(layer input, layer output)")

    heads = list(zip(*curves.head_mass, strict=True))
    for i, values in enumerate(heads):
        mass.plot(layers, values, color="0.8", lw=0.5, label="single heads" if i == 0 else None)
    mass.plot(layers, curves.mass, "o-", color=IMAGE, ms=3, label="mean over heads")
    mass.set_ylim(bottom=0)
    _describe(mass, "Text-to-image attention", "attention mass on image keys (probability)")

    lens.plot(layers, curves.image_kl, "o-", color=IMAGE, ms=3, label="image positions")
    lens.plot(layers, curves.text_kl, "o-", color=TEXT, ms=3, label="text positions")
    for layer, color in ((result.image_transition, IMAGE), (result.text_transition, TEXT)):
        if layer is not None:
            lens.axvline(layer, color=color, ls=":", lw=1)
    lens.set_ylim(bottom=0)
    _describe(lens, "Logit lens (dotted: transition layers)", "KL(final || layer) (nats)")

    window, split = result.recommendation.window, result.recommended_split
    for axis in (cosine, mass, lens):
        axis.set_xticks(list(layers)[:: max(1, result.n_layers // 16)])
        if window is not None and split is not None:
            axis.axvspan(window[0], window[1], color=SPLIT, alpha=0.12)
            axis.axvline(split, color=SPLIT, ls="--", lw=1.5, label=f"recommended split {split}")
        axis.legend(fontsize=8)
    headline = f"recommended split: {split}" if split is not None else "no split recommended"
    figure.suptitle(
        f"Visual saturation, {result.samples} samples: {headline}\n{result.recommendation.reason}",
        fontsize=9,
        wrap=True,
    )
    path = Path(path)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return path


def _describe(axis: Any, title: str, y_label: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("decoder layer")
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.3)
