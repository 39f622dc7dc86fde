"""Figures of the saturation measurement: three panels over the layers, for one model or for several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.diagnostics.plotting import (
    IMAGE,
    OTHER,
    SPLIT,
    TEXT,
    layer_axis,
    panels,
    write_figure,
)

if TYPE_CHECKING:
    from llava_patch.diagnostics.saturation.result import SaturationResult

OWN = "0.25"  # a patched model's own split: dark, unlike the green of a recommendation
COLOURS = (IMAGE, TEXT, SPLIT, OTHER, "#dd8452", "#64b5cd", "#937860", "#da8bc3", "#8c8c8c", "#ccb974")
TITLES = ("How little a layer turns states", "Text attention on the image", "Logit lens")
UNITS = ("cosine(layer input, output)", "attention mass (probability)", "KL(final || layer) (nats)")
_MARKED: dict[str, Any] = {"marker": "o", "ms": 2.5}


def saturation_figure(result: "SaturationResult", path: str | Path) -> Path:
    """Cosine, attention mass and logit-lens KL over the layers; the recommended window is shaded.

    A patched model's own split, or the layer where it prunes, is marked apart from a recommendation.

    Returns:
        The path written.
    """
    curves, layers = result.curves, range(result.n_layers)
    figure, (cosine, mass, lens) = panels(1, 3)
    cosine.plot(layers, curves.image_cosine, color=IMAGE, label="image positions", **_MARKED)
    cosine.plot(layers, curves.text_cosine, color=TEXT, label="text positions", **_MARKED)
    for i, values in enumerate(zip(*curves.head_mass, strict=True)):
        mass.plot(layers, values, color="0.8", lw=0.5, label="single heads" if i == 0 else None)
    mass.plot(layers, curves.mass, color=IMAGE, label="mean over heads", **_MARKED)
    mass.set_ylim(0, 1.02)
    lens.plot(layers, curves.image_kl, color=IMAGE, label="image positions", **_MARKED)
    lens.plot(layers, curves.text_kl, color=TEXT, label="text positions", **_MARKED)
    for layer, color, what in ((result.image_transition, IMAGE, "image"), (result.text_transition, TEXT, "text")):
        if layer is not None:
            lens.axvline(layer, color=color, ls=":", lw=1, label=f"{what} transition {layer}")
    lens.set_ylim(bottom=0)
    window, patch = result.recommendation.window, result.patch
    for axis, title, unit in zip((cosine, mass, lens), TITLES, UNITS, strict=True):
        _describe(axis, title, unit, result.n_layers)
        if window is not None:
            axis.axvspan(window[0] - 0.15, window[1] + 0.15, color=SPLIT, alpha=0.15, lw=0)
            axis.axvline(window[0], color=SPLIT, ls="--", lw=1.2, label=f"recommended split {window[0]}")
        if patch is not None and patch.split is not None:
            axis.axvline(patch.split, color=OWN, ls="-.", lw=1.2, label=f"the model's own split {patch.split}")
        if patch is not None and patch.prune_at is not None:
            axis.axvline(patch.prune_at, color=OTHER, ls=(0, (1, 1)), lw=1.2, label=f"prunes at {patch.prune_at}")
        axis.legend()
    head = f"recommended split {result.worded(result.recommended_split)}"
    if result.recommended_split is None:
        head = f"model {patch.words}" if patch is not None else "no split recommended"
    figure.suptitle(f"Visual saturation, {result.samples} samples: {head}", fontsize=9)
    return write_figure(figure, path)


def comparison_figure(results: "Mapping[str, SaturationResult]", path: str | Path) -> Path:
    """The image curves of several models in one colour each; dashed where each one's recommended split is.

    Models of different depth share an axis in percent of depth.

    Returns:
        The path written.
    """
    from matplotlib.lines import Line2D

    depths = {result.n_layers for result in results.values()}
    alike = len(depths) == 1
    figure, axes = panels(1, 3)
    handles: list[Any] = []
    for i, (name, result) in enumerate(results.items()):
        color = COLOURS[i % len(COLOURS)]
        style: dict[str, Any] = {"color": color, "ls": ("-", "--", ":")[i // len(COLOURS) % 3], **_MARKED}
        unit = 1.0 if alike else 100.0 / result.n_layers
        layers = [layer * unit for layer in range(result.n_layers)]
        for axis, values in zip(
            axes, (result.curves.image_cosine, result.curves.mass, result.curves.image_kl), strict=True
        ):
            axis.plot(layers, values, **style)
            # Equal splits of several models lie over each other: dashes that start at different places show all.
            for split, dash in ((result.recommended_split, 4), (result.split, 1)):
                if split is not None:
                    axis.axvline(split * unit, color=color, lw=1.1, ls=(i * 4, (dash, 4 * len(results) - dash)))
        split = result.recommended_split if result.patch is None else result.split
        label = "no split" if split is None else f"split {split}" if result.patch is None else f"own split {split}"
        handles.append(Line2D([], [], label=f"{name} ({label})", **style))
    for axis, title, unit_of in zip(axes, TITLES, UNITS, strict=True):
        _describe(axis, title, unit_of, max(depths), "" if alike else "depth (% of decoder layers)")
    axes[1].set_ylim(bottom=0)
    axes[2].set_ylim(bottom=0)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)), fontsize=7)
    figure.suptitle("Visual saturation at image positions (dashed: recommended split, dotted: own split)", fontsize=9)
    return write_figure(figure, path)


def _describe(axis: Any, title: str, unit: str, n_layers: int, percent: str = "") -> None:
    axis.set_title(title)
    axis.set_ylabel(unit)
    if percent:
        axis.set_xlim(-2, 102)
        axis.set_xlabel(percent)
    else:
        layer_axis(axis, n_layers)
