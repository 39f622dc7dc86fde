"""Figures of the saturation measurement: three panels over the layers, for one model or for several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_patch.core.extras import optional
from llava_patch.core.plotting import (
    IMAGE,
    OTHER,
    SPLIT,
    STYLE,
    TEXT,
    layer_axis,
    mark_pruning,
    mark_split,
    panels,
    write_figure,
)
from llava_patch.measurements.saturation.result import SaturationResult

COLOURS = (IMAGE, TEXT, SPLIT, OTHER, "#dd8452", "#64b5cd", "#937860", "#da8bc3", "#8c8c8c", "#ccb974")
TITLES = ("Hidden states across a layer", "Text attention on the image", "Logit lens")
UNITS = ("cosine(layer input, output)", "attention mass (probability)", "KL(final || layer) (nats)")
HEIGHT = 3.0  # inches: a panel and its share of the legend below
_MARKED: dict[str, Any] = {"marker": "o", "ms": 2.5}


def saturation_figure(result: SaturationResult, path: str | Path) -> Path:
    """Cosine, attention mass and logit-lens KL over the layers; rings are the transition layers.

    A patched model's own split is dashed as in every figure, and the layer where it prunes has a line of its own; a
    recommended split is a dotted line that opens a shaded window.

    Returns:
        The path written.
    """
    mpl = optional("matplotlib")

    with mpl.rc_context(STYLE):
        figure, axes = panels(1, 3, HEIGHT)
        _draw(result, axes)
        for axis, title, unit in zip(axes, TITLES, UNITS, strict=True):
            _describe(axis, title, unit, result.n_layers)
        _mark(result, axes)
        _one_legend(figure, axes)
        head = f"recommended split {result.worded(result.recommended_split)}"
        if result.recommended_split is None:
            head = f"model {result.patch.words}" if result.patch is not None else "no split recommended"
        samples = f"{result.samples} sample" + "s" * (result.samples != 1)
        figure.suptitle(f"Visual saturation, {samples}: {head}", fontsize=9)
    return write_figure(figure, path)


def _draw(result: SaturationResult, axes: list[Any]) -> None:
    curves, layers = result.curves, range(result.n_layers)
    cosine, mass, lens = axes
    for i, values in enumerate(zip(*curves.head_mass, strict=True)):
        mass.plot(layers, values, color="0.8", lw=0.5, label="single heads" if i == 0 else None)
    mass.plot(layers, curves.mass, color=IMAGE, **_MARKED)
    mass.set_ylim(0, 1.02)
    for color, label, angle, kl, transition in (
        (IMAGE, "image positions", curves.image_cosine, curves.image_kl, result.image_transition),
        (TEXT, "text positions", curves.text_cosine, curves.text_kl, result.text_transition),
    ):
        cosine.plot(layers, angle, color=color, label=label, **_MARKED)
        lens.plot(layers, kl, color=color, **_MARKED)
        if transition is not None:
            ring = f"{label.split()[0]} transition {transition}"
            lens.plot([transition], [kl[transition]], "o", ms=8, mfc="none", mec=color, clip_on=False, label=ring)
    lens.set_ylim(bottom=0)


def _mark(result: SaturationResult, axes: list[Any]) -> None:
    window, patch = result.recommendation.window, result.patch
    for axis in axes:
        if window is not None:
            axis.axvspan(window[0] - 0.15, window[1] + 0.15, color=SPLIT, alpha=0.15, lw=0, label="window")
            axis.axvline(window[0], color=SPLIT, ls=":", lw=1.6, label=f"recommended split {window[0]}")
        if patch is not None:
            mark_split(axis, patch.split, "own split")
            mark_pruning(axis, patch.prune_at)


def _one_legend(figure: Any, axes: list[Any]) -> None:
    # Below the panels: inside them it would hide curves, which come from every corner.
    found: dict[str, Any] = {}
    for axis in axes:
        found.update({label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)})
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=len(found), columnspacing=1.2)


def comparison_figure(results: Mapping[str, SaturationResult], path: str | Path) -> Path:
    """The image curves of several models in one colour each; a filled triangle is each one's recommended split.

    An open triangle is a patched model's own split. Models of different depth share an axis in percent of depth.

    Returns:
        The path written.
    """
    mpl = optional("matplotlib")
    Line2D = optional("matplotlib.lines").Line2D

    depths = {result.n_layers for result in results.values()}
    alike = len(depths) == 1
    handles: list[Any] = []
    with mpl.rc_context(STYLE):
        figure, axes = panels(1, 3, HEIGHT + 0.15 * ((len(results) - 1) // 3))
        for i, (name, result) in enumerate(results.items()):
            style: dict[str, Any] = {
                "color": COLOURS[i % len(COLOURS)],
                "ls": ("-", "--", ":")[i // len(COLOURS) % 3],
                **_MARKED,
            }
            unit = 1.0 if alike else 100.0 / result.n_layers
            layers = [layer * unit for layer in range(result.n_layers)]
            curves = result.curves
            for axis, values in zip(axes, (curves.image_cosine, curves.mass, curves.image_kl), strict=True):
                axis.plot(layers, values, **style)
                _flag(axis, result.recommended_split, unit, i, style["color"], filled=True)
                _flag(axis, result.split, unit, i, style["color"], filled=False)
            handles.append(Line2D([], [], label=f"{name} ({_said(result)})", **style))
        for axis, title, unit_of in zip(axes, TITLES, UNITS, strict=True):
            _describe(axis, title, unit_of, max(depths), "" if alike else "depth (% of decoder layers)")
        axes[1].set_ylim(bottom=0)
        axes[2].set_ylim(bottom=0)
        figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)))
        figure.suptitle("Visual saturation at image positions: recommended split ▼, own split ▽", fontsize=9)
    return write_figure(figure, path)


def _said(result: SaturationResult) -> str:
    if result.patch is not None:
        return "no split of its own" if result.split is None else f"own split {result.split}"
    return "no split" if result.recommended_split is None else f"split {result.recommended_split}"


def _flag(axis: Any, layer: int | None, unit: float, number: int, color: str, filled: bool) -> None:
    """A triangle on a line; those of equal splits hang below each other."""
    if layer is None:
        return
    axis.axvline(layer * unit, color=color, lw=0.8, ls=":" if filled else "--", zorder=1)
    face, across = color if filled else "white", axis.get_xaxis_transform()
    axis.plot([layer * unit], [0.96 - 0.07 * (number % 10)], "v", ms=5, mec=color, mfc=face, transform=across, zorder=4)


def _describe(axis: Any, title: str, unit: str, n_layers: int, percent: str = "") -> None:
    axis.set_title(title)
    axis.set_ylabel(unit)
    if percent:
        axis.set_xlim(-2, 102)
        axis.set_xlabel(percent)
    else:
        layer_axis(axis, n_layers)
