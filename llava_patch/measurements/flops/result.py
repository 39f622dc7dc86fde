"""The table of every variant's FLOPs, as a result that is saved, and its figure."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import nn

from llava_patch.core import plotting
from llava_patch.core.errors import SettingError
from llava_patch.measurements.base import Result, Table, decode, default_split, drawn, encode
from llava_patch.measurements.flops import count
from llava_patch.measurements.flops.count import Flops, Mode, Prompt
from llava_patch.measurements.flops.shape import ModelShape, shape_of
from llava_patch.patching.handle import get_handle
from llava_patch.routing.pruning import Pruning
from llava_patch.settings.methods import FastV, Routing, from_dict, to_dict

OWN = "as configured"
PAPER = "25-30 %"  # forward FLOPs saved, DPVR paper, abstract (7B)
PAPER_SIZES = 32, 4096  # layers and width of its decoder
PASSES = tuple(mode.name.lower() for mode in Mode)  # fields of `Row`
_UNITS = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
TEXTS = (32, 64, 128, 256, 512)  # the DPVR paper's Table 8
_PARTS = (
    ("projections", "projections", plotting.TEXT),
    ("feed_forward", "feed-forward", plotting.OTHER),
    ("attention", "attention", plotting.IMAGE),
)
_COLOURS = ("0.45", "#dd8452", "#55a868", "#8172b3", "#937860", "#4c72b0", "#64b5cd", "#c44e52")


@dataclass(frozen=True)
class Variant:
    """One row's settings."""

    name: str  # as the table says it
    routing: Routing | None = None
    pruning: Pruning | None = None


@dataclass(frozen=True)
class Row:
    """One variant at one prompt."""

    variant: Variant
    forward: Flops  # a plain forward pass
    prefill: Flops  # generation's
    decode: Flops  # the first token after it
    deep_image: int  # FLOPs of image positions in the layers from the split on, in a plain forward pass
    cache_bytes: int  # of the KV cache after the prompt

    @classmethod
    def of(cls, shape: ModelShape, variant: Variant, prompt: Prompt, split: int, value_bytes: int = 2) -> "Row":
        """Count one variant."""
        program = count.program_of(shape, variant.routing, variant.pruning)
        passes = {mode.name.lower(): count.count_flops(shape, program, prompt, mode) for mode in Mode}
        deep = count.deep_image_flops(shape, program, prompt, split)
        held = count.cache_bytes(shape, program, prompt, value_bytes)
        return cls(variant, **passes, deep_image=deep, cache_bytes=held)

    def to_dict(self, stock: "Row") -> dict[str, Any]:
        """Plain JSON values, with totals, and shares of the stock model's."""
        methods = {"routing": self.variant.routing, "pruning": self.variant.pruning}
        return {
            "variant": {"name": self.variant.name, **{k: v and to_dict(v) for k, v in methods.items()}},
            **{name: getattr(self, name).to_dict() for name in PASSES},
            **{f"{name}_share": getattr(self, name).total / getattr(stock, name).total for name in PASSES},
            "deep_image": self.deep_image,
            "cache_bytes": self.cache_bytes,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Row":
        """Read what `to_dict` made."""
        variant = values["variant"]
        read = {k: from_dict(variant[k], "flops") if variant[k] else None for k in ("routing", "pruning")}
        kept = [field.name for field in fields(Flops)]  # the others are totals
        passes = {name: decode(Flops, {k: values[name][k] for k in kept}) for name in PASSES}
        counts = {name: decode(int, values[name]) for name in ("deep_image", "cache_bytes")}
        return cls(Variant(decode(str, variant["name"]), **read), **passes, **counts)


@dataclass(frozen=True)
class FlopsResult(Result):
    """FLOPs of every variant of a model."""

    NAME, TITLE = "flops", "FLOPs"
    FIGURE = "llava_patch.measurements.flops.result:flops_figure"

    shape: ModelShape  # the model's sizes
    split: int  # first routed layer of the routed rows
    prompts: tuple[Prompt, ...]  # what the tables are for
    rows: tuple[tuple[Row, ...], ...]  # for each prompt, a row a variant; the stock model comes first
    value_bytes: int = 2  # of one number in the KV cache

    def row(self, name: str, prompt: int = 0) -> Row | None:
        """The row of a variant at one of the prompts."""
        return next((row for row in self.rows[prompt] if row.variant.name == name), None)

    def saved(self, row: Row, mode: str = "forward", prompt: int = 0) -> float:
        """Share of the stock model's FLOPs that a row saves: "forward", "prefill" or "decode"."""
        return 1 - getattr(row, mode).total / getattr(self.rows[prompt][0], mode).total

    def saved_by_routing(self, row: Row, prompt: int = 0) -> float:
        """Share of the stock prefill that a row saves without answering at the last position alone.

        What `saved(row, "prefill")` says besides comes from that position, not from where image tokens go.
        """
        program = count.program_of(self.shape, row.variant.routing, row.variant.pruning)
        plain = count.count_flops(self.shape, program, self.prompts[prompt], Mode.PREFILL, lean=False)
        return 1 - plain.total / self.rows[prompt][0].prefill.total

    def finding(self) -> str:
        """Whether the configured variant, or LF, saves anything worth having."""
        row, prompt = self.main_row(), self.prompts[0]
        name = "The model as configured" if row.variant.name == OWN else f"LF with split {self.split}"
        saved, where = self.saved(row), f"with {prompt.image} image and {prompt.text} text tokens"
        if saved <= 0:
            return f"{name} saves nothing of a forward pass {where}: it costs {-saved:.1%} more."
        lean = self.saved(row, "prefill") - self.saved_by_routing(row)
        return (
            f"{name} saves {saved:.1%} of a forward pass {where}, and {self.saved_by_routing(row):.1%} of generation's "
            f"prefill; answering at the last position alone saves the prefill another {lean:.1%}."
        )

    def caution(self) -> str:
        """What a count is not."""
        return (
            "Counted, so exact and without an interval; FLOPs are not time: llava-patch bench measures that. "
            "What the last "
            "position alone saves does not depend on where image tokens go, and a stock model could save it too."
        )

    def main_row(self) -> Row:
        """What the summary and the figure are about: the configured variant, or LF."""
        return next(row for row in self.rows[0][::-1] if row.variant.name.startswith((OWN, "LF, K")))

    def summary(self) -> str:
        """What was found, in two sentences."""
        row, stock, prompt = self.main_row(), self.rows[0][0], self.prompts[0]
        scale, unit = _unit(stock.forward.total)
        routing, pruning, name = row.variant.routing, row.variant.pruning, row.variant.name
        what = f"{name} with split {self.split}"
        if name == OWN:
            own = [f"{routing.variant} with split {routing.split}"] if routing is not None else []
            own += [pruning.label] if pruning is not None else []
            what = f"{OWN} ({' and '.join(own)})"
        paper = f" The DPVR paper gives {PAPER} of forward FLOPs for LLaVA-1.5 7B."
        of_paper = (self.shape.decoder.layers, self.shape.decoder.hidden) == PAPER_SIZES
        return (
            f"{self.shape.name}, {prompt.image} image and {prompt.text} text tokens: {what} takes "
            f"{row.forward.total / scale:.3g} of {stock.forward.total / scale:.3g} {unit} a forward pass "
            f"({self.saved(row):.1%} saved; of the decoder alone {1 - row.forward.decoder / stock.forward.decoder:.1%}"
            f"), and {self.saved(row, 'prefill'):.1%} less at generation's prefill, where the last layer answers at "
            f"one position. Tower, projector and head, which no variant changes, are counted.{paper * of_paper}"
        )

    def table(self, prompt: int = 0) -> Table:
        """Head and rows for one of the prompts."""
        stock = self.rows[prompt][0]
        scale, unit = _unit(stock.forward.total)
        small, small_unit = _unit(stock.decode.total)
        head = [
            "variant", f"forward {unit}", "saved", f"prefill {unit}", "saved", "of it by routing", "deep image",
            f"token {small_unit}", "cache MB",
        ]  # fmt: skip
        return head, [
            [
                row.variant.name,
                f"{row.forward.total / scale:.3f}",
                f"{self.saved(row, prompt=prompt):.1%}",
                f"{row.prefill.total / scale:.3f}",
                f"{self.saved(row, 'prefill', prompt):.1%}",
                f"{self.saved_by_routing(row, prompt):.1%}",
                f"{row.deep_image / stock.deep_image if stock.deep_image else 0:.1%}",
                f"{row.decode.total / small:.2f}",
                f"{row.cache_bytes / 1e6:.4g}",
            ]
            for row in self.rows[prompt]
        ]

    def encode(self) -> dict[str, Any]:
        """A table a prompt, with totals and shares."""
        return {
            "shape": encode(self.shape),
            "split": self.split,
            "value_bytes": self.value_bytes,
            "summary": self.summary(),
            "tables": [
                {"prompt": asdict(prompt), "rows": [row.to_dict(rows[0]) for row in rows]}
                for prompt, rows in zip(self.prompts, self.rows, strict=True)
            ],
        }

    @classmethod
    def decode(cls, values: dict[str, Any]) -> "FlopsResult":
        """Read the rows; totals, shares and summary are worked out again."""
        tables = values["tables"]
        return cls(
            decode(ModelShape, values["shape"]),
            decode(int, values["split"]),
            tuple(decode(Prompt, table["prompt"]) for table in tables),
            tuple(tuple(map(Row.from_dict, table["rows"])) for table in tables),
            decode(int, values["value_bytes"]),
            facts=values.get("facts", {}),
        )


def _unit(value: float) -> tuple[float, str]:
    return next(((scale, name) for scale, name in _UNITS if value >= scale), _UNITS[-1])


def measure_flops(
    shape: ModelShape | nn.Module,
    prompts: Sequence[Prompt] | None = None,
    split: int | None = None,
    fusion_layers: int | tuple[int, ...] = 1,
    side_layers: int = 1,
    own: tuple[Routing | None, Pruning | None] | None = None,
    value_bytes: int = 2,
) -> FlopsResult:
    """FLOPs of the stock model and every variant.

    Args:
        shape: a model of either host, stock or patched, or the sizes of one: `shape.named("7b")`,
            `shape.read_shape(checkpoint)`.
        prompts: what each table is for; None: one image of the model, and 64 text tokens.
        split: first routed layer; None: that of `own`, else 18/32 of the depth (the paper's 7B).
        fusion_layers: of LF's row: a count, or layer numbers.
        side_layers: depth of the side branch.
        own: routing and pruning that get a row of their own; None: those of a patched model.
        value_bytes: of one number in the KV cache: 2 in half precision.

    Raises:
        SettingError: a split, or layers, that the model cannot take.
        HostError: a model, or a vision tower, that is not known.
    """
    if not isinstance(shape, ModelShape):
        handle = get_handle(shape)
        own = (handle.routing, handle.pruning) if own is None and handle is not None else own
        shape = shape_of(shape)
    prompts = [Prompt(image=shape.projected)] if prompts is None else prompts
    own = (None, None) if own is None else own
    depth = shape.decoder.layers
    routing, pruning = own
    if split is None:
        split = int(routing.split) if routing is not None and isinstance(routing.split, int) else default_split(depth)
    if not 0 <= split < depth:
        raise SettingError(f"split = {split} is outside 0..{depth - 1}: the model has {depth} decoder layers")
    found = variants(split, fusion_layers, side_layers, depth)
    if routing is not None or pruning is not None:
        found.append(Variant(OWN, routing, pruning))
    rows = tuple(tuple(Row.of(shape, variant, prompt, split, value_bytes) for variant in found) for prompt in prompts)
    return FlopsResult(shape, split, tuple(prompts), rows, value_bytes)


def variants(split: int, fusion_layers: int | tuple[int, ...], side_layers: int, depth: int) -> list[Variant]:
    """The rows of the table: the paper's Table 1, and the pruning baselines."""

    def routed(name: str, **more: Any) -> Routing:
        return Routing(variant=name, split=split, side_layers=side_layers, **more)

    lf = routed("lf", fusion_layers=fusion_layers)
    at = f"= {fusion_layers}" if isinstance(fusion_layers, int) else f"at {','.join(map(str, fusion_layers))}"
    rows = [
        Variant("stock"), Variant("PC", routed("pc")), Variant("KV", routed("kv")), Variant(f"LF, K {at}", lf),
        Variant("ideal", routed("ideal")), Variant("VTW", Routing(variant="vtw", split=split)),
    ]  # fmt: skip
    if depth > 2:
        rows.append(Variant("FastV(2, ½)", None, FastV(2, 0.5)))
        if split >= 2:
            rows.append(Variant("LF + FastV(2, ½)", lf, FastV(2, 0.5)))
    return rows


@drawn
def flops_figure(result: FlopsResult) -> Any:
    """What each decoder layer costs, and what the variants save over text lengths."""
    figure, (layers, lengths) = plotting.panels(1, 2)
    _draw_layers(layers, result)
    _draw_lengths(lengths, result)
    return figure


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
    title = f"{row.variant.name}: {result.prompts[0].image} image + {result.prompts[0].text} text tokens"
    axis.set(ylim=(0, 1.5 * highest), ylabel=f"{unit} a forward pass", title=title)  # with room for the legend
    axis.legend(ncols=3, loc="upper center", handlelength=1.2, columnspacing=0.8, framealpha=1, borderpad=0.3)


def _draw_lengths(axis: Any, result: FlopsResult) -> None:
    """Share of the stock model's forward FLOPs that each variant saves, over the text's length."""
    prompt = result.prompts[0]
    texts = sorted({*TEXTS, *(p.text for p in result.prompts)})
    stock = count.program_of(result.shape, None, None)
    curves = {}
    for row in result.rows[0][1:]:
        program = count.program_of(result.shape, row.variant.routing, row.variant.pruning)
        saved = []
        for text in texts:
            there = replace(prompt, text=text)
            base = count.count_flops(result.shape, stock, there).total
            saved.append(100 * (1 - count.count_flops(result.shape, program, there).total / base))
        curves[row.variant.name] = saved
    for number, (name, shares) in enumerate(plotting.distinct(curves).items(), 1):
        axis.plot(texts, shares, marker="o", ms=2.5, color=_COLOURS[number % len(_COLOURS)], label=name)
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(texts, [str(text) for text in texts])
    axis.set(xlabel=f"text tokens (beside {prompt.image} image tokens)", ylabel="forward FLOPs saved (%)")
    axis.set_title(f"{result.shape.name}, split {result.split}")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.45 * (high - low))
    axis.legend(ncols=2, loc="upper center", handlelength=1.2, columnspacing=0.8, framealpha=1, borderpad=0.3)
