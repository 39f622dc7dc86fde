"""Figures of the gradient reach."""

from collections.abc import Sequence
from typing import Any

from llava_patch.core import plotting
from llava_patch.measurements.base import drawn
from llava_patch.measurements.reach import measurement as groups
from llava_patch.measurements.reach.measurement import (
    FROZEN,
    NONE,
    NONZERO,
    ZERO,
    PartReach,
    ReachComparison,
    ReachResult,
)

_MARKS = {ZERO: ("o", "exactly 0"), NONE: ("x", "none arrives"), FROZEN: ("_", "frozen")}
_BELOW = 0.035  # share of the axis's height at which parts without any gradient are marked, below 0
_LINES = {"lf": ("#4c72b0", "o"), "pc": ("#dd8452", "s"), "kv": ("#55a868", "."), "ideal": ("#8172b3", "o")}
_SHORT = {
    groups.EMBEDDING: "embed", groups.AFTER: "after", groups.PROJECTOR: "proj", groups.STACK: "stack",
    groups.TOKENS: "tokens", groups.NORM: "norm", groups.HEAD: "head", groups.OTHER: "other",
}  # fmt: skip


@drawn
def reach_figure(result: ReachResult) -> Any:
    """Gradient norms of the vision side and of the decoder, and the side output's by layer where there is a branch."""
    figure, axes = plotting.panel_grid(2 if result.side is None else 3, columns=2)
    for axis in axes[:2]:  # one scale, so that tower and decoder compare
        _scale(axis, [f.norm for f in result.parts if f.state in (NONZERO, ZERO)], 0.3)
    _draw_parts(axes[0], result, (groups.EMBEDDING, groups.BLOCK, groups.AFTER, groups.PROJECTOR, groups.STACK))
    axes[0].set(title="Vision tower and projector", xlabel="tower block")
    _draw_decoder(axes[1], result)
    if result.side is not None:
        _draw_side(axes[2], [result])
        axes[2].set_title("Side branch's output, by layer")
    samples = f"{result.samples} sample" + "s" * (result.samples != 1)
    figure.suptitle(f"Where the gradient goes: {result.name}, {samples}", fontsize=9)
    return figure


@drawn
def comparison_figure(result: ReachComparison) -> Any:
    """The side output's gradient by layer for every variant, and as a whole."""
    figure, (layers, whole) = plotting.panels(1, 2)
    shown = [r for r in result.results if r.side is not None]
    _draw_side(layers, shown)
    layers.set_title("Gradient at the side branch's output")
    _draw_whole(whole, shown)
    return figure


def _draw_parts(axis: Any, result: ReachResult, kinds: tuple[str, ...]) -> None:
    """Bars on a log axis over parts in the order of the model; exact zeros at 0, and below it what has no gradient."""
    parts = [found for kind in kinds for found in result.of(kind)]
    labels = [str(f.part.number) if f.part.number is not None else _SHORT[f.part.kind] for f in parts]
    _bars(axis, parts)
    blocks = [i for i, f in enumerate(parts) if f.part.number is not None]
    step = max(1, len(blocks) // 6)
    places = [i for i in range(len(parts)) if i not in blocks] + blocks[::step]
    axis.set_xticks(sorted(places), [labels[i] for i in sorted(places)])
    for i, tick in zip(sorted(places), axis.get_xticklabels(), strict=True):
        if i not in blocks:
            tick.set(rotation=60, ha="right", rotation_mode="anchor")
    _legend(axis)


def _draw_decoder(axis: Any, result: ReachResult) -> None:
    layers = result.of(groups.LAYER)
    _bars(axis, layers)
    fused = [number for number, found in enumerate(layers) if found.part.role == "fusion"]
    for number in fused:
        axis.axvspan(number - 0.5, number + 0.5, color=plotting.SPLIT, alpha=0.2)
    if result.split is not None:
        side = list(enumerate(result.of(groups.SIDE), result.split))
        if alive := {number: found.norm for number, found in side if found.state == NONZERO}:
            style: dict[str, Any] = {"color": "none", "edgecolor": plotting.IMAGE, "hatch": "////"}
            axis.bar(list(alive), list(alive.values()), width=0.5, label="side branch", **style)
        if dead := {number: found.state for number, found in side if found.state in (ZERO, NONE)}:
            state = next(iter(dead.values()))
            marker, word = _MARKS[state]
            style = {"color": plotting.IMAGE, "ms": 5, "mfc": "white", "label": f"side branch: {word}"}
            if state == ZERO:
                axis.plot(list(dead), [0.0] * len(dead), marker, **style)
            else:
                axis.plot(list(dead), [2 * _BELOW] * len(dead), marker, transform=axis.get_xaxis_transform(), **style)
    plotting.layer_axis(axis, result.n_layers)
    if result.split is not None:
        axis.axvline(result.split - 0.5, color=plotting.SPLIT, ls="--", lw=1.2, label=f"split {result.split}")
    axis.set_title("Decoder layers" + (" (shaded: fusion)" if fused else ""))
    _legend(axis)


def _bars(axis: Any, parts: Sequence[PartReach]) -> None:
    alive = {p: f.norm for p, f in enumerate(parts) if f.state == NONZERO and f.norm > 0}
    if alive:
        axis.bar(list(alive), list(alive.values()), color=plotting.TEXT, width=0.8, label="gradient")
    for state, (marker, label) in _MARKS.items():
        if there := [p for p, f in enumerate(parts) if f.state == state]:
            style = {"color": "0.35", "ms": 4, "mfc": "none", "label": label}
            if state == ZERO:
                axis.plot(there, [0.0] * len(there), marker, **style)
            else:
                axis.plot(there, [_BELOW] * len(there), marker, transform=axis.get_xaxis_transform(), **style)
    axis.set_ylabel("gradient norm")
    axis.grid(axis="x", visible=False)


def _scale(axis: Any, norms: Sequence[float], room: float) -> None:
    """A log axis with 0 on it, below that a strip for marks, and above the largest norm room for a legend."""
    low = plotting.log_axis(axis, [0.0, *norms])
    if low is None:  # nothing that a scale could measure
        axis.set(ylim=(-0.3, 1.0), yticks=[0.0], yticklabels=["0"] if norms else [""])
        return
    high = 2 * max(norms)
    axis.set_ylim(-0.45 * low, high * (10 * high / low) ** room)


def _legend(axis: Any) -> None:
    axis.legend(ncols=2, loc="upper center", handlelength=1.2, columnspacing=0.8, framealpha=1, borderpad=0.3)


def _draw_side(axis: Any, results: list[ReachResult]) -> None:
    """One line a variant over the deep layers; a layer that reads the output for nothing is a mark at 0.

    Variants that say the same share a line and its label.
    """
    first = results[0]
    _scale(axis, [n for r in results if r.side for n in (*r.side.layers.values(), r.side.norm or 0.0)], 0.35)
    together: dict[tuple[Any, ...], list[str]] = {}
    for result in results:
        assert result.side is not None
        together.setdefault(tuple(result.side.layers.items()), []).append(result.variant)
    for result in results:
        assert result.side is not None
        variant = result.variant
        same = together[tuple(result.side.layers.items())]
        if variant != same[0]:
            continue
        colour, marker = _LINES.get(variant, (plotting.TEXT, "o"))
        variant = " ≡ ".join(same)
        if alive := {k: v for k, v in result.side.layers.items() if v > 0}:
            axis.plot(
                list(alive), list(alive.values()), marker=marker, ms=7 if marker == "s" else 4, mfc="none",
                ls=":" if marker == "." else "-", color=colour, label=variant,
            )  # fmt: skip
        dead = [k for k in result.side.layers if k not in alive]
        if dead or not alive:
            style = {"ms": 5, "mfc": "none", "color": colour}
            if dead:
                axis.plot(dead, [0.0] * len(dead), "o", label=f"{variant}: exactly 0", **style)
            else:
                across = axis.get_xaxis_transform()
                axis.plot([result.n_layers], [_BELOW], "x", transform=across, label=f"{variant}: none arrives", **style)
        if len(results) == 1 and result.side.norm:
            axis.axhline(result.side.norm, color="black", ls=":", lw=1, label="whole")
    plotting.layer_axis(axis, first.n_layers + 1, "decoder layer that reads it")
    left = 0 if first.split is None else first.split
    step = max(1, (first.n_layers - left) // 8)
    places = [n for n in range(left, first.n_layers, step) if n + step <= first.n_layers] + [first.n_layers]
    axis.set_xticks(places, [*map(str, places[:-1]), "end"])
    axis.set_xlim(left - 1, first.n_layers + 0.7)
    if first.split is not None:
        axis.axvline(first.split - 0.5, color=plotting.SPLIT, ls="--", lw=1.2, label=f"split {first.split}")
    axis.set_ylabel("‖∂loss / ∂(side output)‖")
    _legend(axis)


def _draw_whole(axis: Any, results: list[ReachResult]) -> None:
    names = [r.name for r in results]
    norms = [r.side.norm if r.side is not None and r.side.norm else 0.0 for r in results]
    colours = [_LINES.get(r.variant, (plotting.TEXT, ""))[0] for r in results]
    bars = axis.bar(names, norms, color=colours, width=0.6)
    words = [
        f"{n:.2g}\n{len(r.reading_layers)} layer{'s' * (len(r.reading_layers) != 1)}" if n else "0"
        for n, r in zip(norms, results, strict=True)
    ]
    axis.bar_label(bars, words, padding=1, fontsize=7)
    axis.margins(y=0.22)
    axis.grid(axis="x", visible=False)
    axis.set(ylabel="‖∂loss / ∂(side output)‖", title="Whole, and number of layers it comes through")
