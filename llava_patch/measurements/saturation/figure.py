"""Figures of the saturation measurement: panels over the layers, for one model or for several."""

from collections.abc import Mapping
from typing import Any

from llava_patch.core import plotting
from llava_patch.core.extras import optional
from llava_patch.core.plotting import IMAGE, OTHER, SPLIT, TEXT
from llava_patch.measurements.base import drawn
from llava_patch.measurements.saturation.result import SaturationResult

COLOURS = (IMAGE, TEXT, SPLIT, OTHER, "#dd8452", "#64b5cd", "#937860", "#da8bc3", "#8c8c8c", "#ccb974")
TITLES = ("Hidden states across a layer", "Text attention on the image", "Logit lens", "Image taken away at a split")
UNITS = (
    "cosine(layer input, output)",
    "attention (probability)",
    "KL(final || layer) (nats)",
    "KL of the answers (nats)",
)
HEIGHT = 3.0  # inches: a panel and its share of the legend below
_MARKED: dict[str, Any] = {"marker": "o", "ms": 2.5}


@drawn
def saturation_figure(result: SaturationResult) -> Any:
    """Cosine, attention mass, logit-lens KL and what the answers lose over the layers; rings are transition layers.

    A patched model's own split is dashed as in every figure, and the layer where it prunes has a line of its own; a
    recommended split is a dotted line that opens a shaded window.
    """
    figure, axes = _panels(HEIGHT, result.n_layers, count=4 if result.curves.knocked_out else 3)
    _draw(result, axes)
    for axis in axes:
        if result.recommendation.window is not None:
            first, last = result.recommendation.window
            axis.axvspan(first - 0.15, last + 0.15, color=SPLIT, alpha=0.15, lw=0, label="window")
            axis.axvline(first, color=SPLIT, ls=":", lw=1.6, label=f"recommended split {first}")
        if result.patch is not None:
            plotting.mark_split(axis, result.patch.split, "own split")
            plotting.mark_pruning(axis, result.patch.prune_at)
    # One legend below the panels: inside them it would hide curves, which come from every corner.
    found: dict[str, Any] = {}
    for axis in axes:
        found.update({label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)})
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=3, columnspacing=1.2)
    head = f"recommended split {result.worded(result.recommended_split)}"
    if result.recommended_split is None:
        head = f"model {result.patch.words}" if result.patch is not None else "no split recommended"
    samples = f"{result.samples} sample" + "s" * (result.samples != 1)
    figure.suptitle(f"Visual saturation, {samples}: {head}", fontsize=9)
    return figure


def _draw(result: SaturationResult, axes: list[Any]) -> None:
    curves, layers = result.curves, range(result.n_layers)
    cosine, mass, lens = axes[:3]
    for i, values in enumerate(zip(*curves.head_mass, strict=True)):
        mass.plot(layers, values, color="0.8", lw=0.5, label="single heads" if i == 0 else None)
    mass.plot(layers, curves.mass, color=IMAGE, **_MARKED)
    mass.plot(layers, curves.peak, color=OTHER, ls="--", **_MARKED, label="most on one patch, by what answers")
    mass.set_ylim(-0.02, 1.02)
    for color, label, angle, kl, transition, line in (
        (IMAGE, "image positions", curves.image_cosine, curves.image_kl, result.image_transition, "-"),
        (TEXT, "text positions", curves.text_cosine, curves.text_kl, result.text_transition, "--"),
    ):
        cosine.plot(layers, angle, color=color, ls=line, label=label, **_MARKED)
        lens.plot(layers, kl, color=color, ls=line, **_MARKED)
        if transition is not None:
            ring = f"{label.split()[0]} transition {transition}"
            lens.plot([transition], [kl[transition]], "o", ms=8, mfc="none", mec=color, clip_on=False, label=ring)
    _from_zero(lens)
    if curves.knocked_out:
        _draw_lost(result, axes[3])


def _draw_lost(result: SaturationResult, axis: Any) -> None:
    curves, layers = result.curves, range(result.n_layers)
    lost = {"image gone for good": curves.withdrawn_kl, "last layer sees it again": curves.fused_kl}
    for (name, values), (color, line) in zip(
        plotting.distinct(lost).items(), (("0.35", "-"), (SPLIT, "--")), strict=False
    ):
        axis.plot(layers, values, color=color, ls=line, label=name, **_MARKED)
    allowed = result.settings.knockout_share * curves.withdrawn_kl[0]
    axis.axhline(allowed, color="0.6", lw=0.8, ls=":", label=f"{result.settings.knockout_share:.0%} of all")
    _from_zero(axis)
    axis.set_xlabel("split")


def _from_zero(axis: Any) -> None:
    """An axis from 0 on, where a mark at 0 is seen whole."""
    axis.set_ylim(bottom=-0.03 * axis.get_ylim()[1])


@drawn
def comparison_figure(results: Mapping[str, SaturationResult]) -> Any:
    """The image curves of several models in one colour each; a filled triangle is each one's recommended split.

    An open triangle is a patched model's own split. Models of different depth share an axis in percent of depth.
    """
    Line2D = optional("matplotlib.lines").Line2D

    depths = {result.n_layers for result in results.values()}
    figure, axes = _panels(HEIGHT + 0.15 * ((len(results) - 1) // 3), *depths)
    handles: list[Any] = []
    for i, (name, result) in enumerate(results.items()):
        color, line = COLOURS[i % len(COLOURS)], ("-", "--", ":")[i // len(COLOURS) % 3]
        style: dict[str, Any] = {"color": color, "ls": line, **_MARKED}
        unit = 1.0 if len(depths) == 1 else 100.0 / result.n_layers
        layers = [layer * unit for layer in range(result.n_layers)]
        curves = result.curves
        for axis, values in zip(axes, (curves.image_cosine, curves.mass, curves.image_kl), strict=True):
            axis.plot(layers, values, **style)
            _flag(axis, result.recommended_split, unit, i, color, filled=True)
            _flag(axis, result.split, unit, i, color, filled=False)
        kind, split = ("split", result.recommended_split) if result.patch is None else ("own split", result.split)
        said = f"{kind} {split}" if split is not None else "no split" + " of its own" * (result.patch is not None)
        handles.append(Line2D([], [], label=f"{name} ({said})", **style))
    for axis in axes[1:]:
        _from_zero(axis)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)))
    figure.suptitle("Visual saturation at image positions: recommended split ▼, own split ▽", fontsize=9)
    return figure


def _flag(axis: Any, layer: int | None, unit: float, number: int, color: str, filled: bool) -> None:
    """A triangle on a line; those of equal splits hang below each other."""
    if layer is None:
        return
    axis.axvline(layer * unit, color=color, lw=0.8, ls=":" if filled else "--", zorder=1)
    face, across = color if filled else "white", axis.get_xaxis_transform()
    axis.plot([layer * unit], [0.96 - 0.07 * (number % 10)], "v", ms=5, mec=color, mfc=face, transform=across, zorder=4)


def _panels(height: float, *depths: int, count: int = 3) -> tuple[Any, list[Any]]:
    """A figure with the first panels over the layers of models of these depths, in percent where they differ."""
    figure, axes = plotting.panel_grid(count, height=height, columns=2)
    for axis, title, unit in zip(axes, TITLES[:count], UNITS[:count], strict=True):
        axis.set(title=title, ylabel=unit)
        if len(depths) == 1:
            plotting.layer_axis(axis, depths[0])
        else:
            axis.set(xlim=(-2, 102), xlabel="depth (% of decoder layers)")
    return figure, axes
