"""The figure of the FLOP model: what each decoder layer costs, and what the variants save over text lengths."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_patch.core import plotting
from llava_patch.core.extras import optional
from llava_patch.measurements.flops.count import count_flops, program_of
from llava_patch.measurements.flops.result import FlopsResult

TEXTS = (32, 64, 128, 256, 512)  # the DPVR paper's Table 8
_PARTS = (
    ("projections", "projections", plotting.TEXT),
    ("feed_forward", "feed-forward", plotting.OTHER),
    ("attention", "attention", plotting.IMAGE),
)
_COLOURS = ("0.45", "#dd8452", "#55a868", "#8172b3", "#937860", "#4c72b0", "#64b5cd", "#c44e52")


def flops_figure(result: FlopsResult, path: str | Path) -> Path:
    """Two panels; returns the path written."""
    mpl = optional("matplotlib")

    figure, (layers, lengths) = plotting.panels(1, 2)
    with mpl.rc_context(plotting.STYLE):
        _draw_layers(layers, result)
        _draw_lengths(lengths, result)
    return plotting.write_figure(figure, path)


def _draw_layers(axis: Any, result: FlopsResult) -> None:
    """Stacked bars of the main row's layers, the stock model's outline over them, the side branch at its place."""
    row, stock = result.main_row(), result.rows[0][0]
    scale, unit = (1e12, "TFLOP") if stock.forward.decoder > 1e12 else (1e9, "GFLOP")
    numbers = list(range(len(row.forward.layers)))
    below = [0.0] * len(numbers)
    for part, label, colour in _PARTS:
        values = [getattr(layer, part) / scale for layer in row.forward.layers]
        axis.bar(numbers, values, bottom=below, color=colour, width=0.85, label=label)
        below = [a + b for a, b in zip(below, values, strict=True)]
    edges = [n - 0.5 for n in (*numbers, len(numbers))]
    axis.stairs([layer.total / scale for layer in stock.forward.layers], edges, color="black", lw=1, label="stock")
    routing = row.variant.routing
    split = routing.split if routing is not None and isinstance(routing.split, int) else None
    if split is not None and split < len(numbers):
        axis.axvline(split - 0.5, color=plotting.SPLIT, ls="--", lw=1.2, label=f"split {split}")
        if row.forward.side.total:
            axis.bar(
                split, row.forward.side.total / scale, bottom=below[split], color="none", edgecolor=plotting.SPLIT,
                hatch="////", width=0.85, label="side branch",
            )  # fmt: skip
    plotting.layer_axis(axis, len(numbers))
    highest = max(layer.total for layer in stock.forward.layers) / scale
    axis.set_ylim(0, 1.5 * highest)  # room for the legend
    axis.set_ylabel(f"{unit} a forward pass")
    prompt = result.prompts[0]
    axis.set_title(f"{row.variant.name}: {prompt.image} image + {prompt.text} text tokens")
    axis.legend(ncols=3, loc="upper center", handlelength=1.2, columnspacing=0.8, framealpha=1, borderpad=0.3)


def _draw_lengths(axis: Any, result: FlopsResult) -> None:
    """Share of the stock model's forward FLOPs that each variant saves, over the text's length."""
    prompt = result.prompts[0]
    texts = sorted({*TEXTS, *(p.text for p in result.prompts)})
    stock = program_of(result.shape, None, None)
    for number, row in enumerate(result.rows[0][1:], 1):
        program = program_of(result.shape, row.variant.routing, row.variant.pruning)
        saved = []
        for text in texts:
            there = replace(prompt, text=text)
            base = count_flops(result.shape, stock, there).total
            saved.append(100 * (1 - count_flops(result.shape, program, there).total / base))
        colour = _COLOURS[number % len(_COLOURS)]
        axis.plot(texts, saved, marker="o", ms=2.5, color=colour, label=row.variant.name)
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(texts, [str(text) for text in texts])
    axis.set_xlabel(f"text tokens (beside {prompt.image} image tokens)")
    axis.set_ylabel("forward FLOPs saved (%)")
    axis.set_title(f"{result.shape.name}, split {result.split}")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.45 * (high - low))
    axis.legend(ncols=2, loc="upper center", handlelength=1.2, columnspacing=0.8, framealpha=1, borderpad=0.3)
