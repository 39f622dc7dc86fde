"""The table of every variant's FLOPs, as a result that is saved and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from llava_patch.core.errors import SettingError
from llava_patch.measurements.base import Result, decode, default_split, encode
from llava_patch.measurements.flops.count import Flops, Prompt, cache_bytes, count_flops, deep_image_flops, program_of
from llava_patch.measurements.flops.products import Mode
from llava_patch.measurements.flops.shape import ModelShape
from llava_patch.settings.methods import FastV, Routing, from_dict, to_dict

OWN = "as configured"
PAPER = "25-30 %"  # forward FLOPs saved, DPVR paper, abstract (7B)
PAPER_SIZES = 32, 4096  # layers and width of its decoder
_UNITS = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))


@dataclass(frozen=True)
class Variant:
    """One row's settings.

    Attributes:
        name: as the table says it.
        routing: its routing, or None.
        pruning: its pruning, or None.
    """

    name: str
    routing: Routing | None = None
    pruning: FastV | None = None


@dataclass(frozen=True)
class Row:
    """One variant at one prompt.

    Attributes:
        variant: what it is.
        forward: a plain forward pass.
        prefill: generation's prefill.
        decode: the first token after it.
        deep_image: FLOPs of image positions in the layers from the split on, in a plain forward pass.
        cache_bytes: of the KV cache after the prompt.
    """

    variant: Variant
    forward: Flops
    prefill: Flops
    decode: Flops
    deep_image: int
    cache_bytes: int


@dataclass(frozen=True)
class FlopsResult(Result):
    """FLOPs of every variant of a model.

    Attributes:
        shape: the model's sizes.
        split: first routed layer of the routed rows.
        prompts: what the tables are for.
        rows: for each prompt, a row a variant; the stock model comes first.
        value_bytes: of one number in the KV cache.
    """

    NAME, TITLE = "flops", "FLOPs"
    FIGURE = "llava_patch.measurements.flops.figure:flops_figure"

    shape: ModelShape
    split: int
    prompts: tuple[Prompt, ...]
    rows: tuple[tuple[Row, ...], ...]
    value_bytes: int = 2

    def row(self, name: str, prompt: int = 0) -> Row | None:
        """The row of a variant at one of the prompts."""
        return next((row for row in self.rows[prompt] if row.variant.name == name), None)

    def saved(self, row: Row, mode: str = "forward", prompt: int = 0) -> float:
        """Share of the stock model's FLOPs that a row saves: "forward", "prefill" or "decode"."""
        return 1 - getattr(row, mode).total / getattr(self.rows[prompt][0], mode).total

    def main_row(self) -> Row:
        """What the summary and the figure are about: the configured variant, or LF."""
        return next(
            row for row in self.rows[0][::-1] if row.variant.name == OWN or row.variant.name.startswith("LF, K")
        )

    def summary(self) -> str:
        """What was found, in two sentences."""
        row, stock, prompt = self.main_row(), self.rows[0][0], self.prompts[0]
        scale, unit = _unit(stock.forward.total)
        what = f"{row.variant.name} with split {self.split}" if row.variant.name != OWN else f"{OWN} ({_say(row)})"
        return (
            f"{self.shape.name}, {prompt.image} image and {prompt.text} text tokens: {what} takes "
            f"{row.forward.total / scale:.3g} of {stock.forward.total / scale:.3g} {unit} a forward pass "
            f"({self.saved(row):.1%} saved; of the decoder alone {1 - row.forward.decoder / stock.forward.decoder:.1%}"
            f"), and {self.saved(row, 'prefill'):.1%} less at generation's prefill, where the last layer answers at "
            f"one position. Tower, projector and head, which no variant changes, are counted.{self._paper()}"
        )

    def _paper(self) -> str:
        decoder = self.shape.decoder
        if (decoder.layers, decoder.hidden) != PAPER_SIZES:
            return ""
        return f" The DPVR paper gives {PAPER} of forward FLOPs for LLaVA-1.5 7B."

    def table(self, prompt: int = 0) -> tuple[list[str], list[list[str]]]:
        """(head, rows) for one of the prompts."""
        rows = self.rows[prompt]
        stock = rows[0]
        scale, unit = _unit(stock.forward.total)
        small, small_unit = _unit(stock.decode.total)
        head = [
            "variant", f"forward {unit}", "saved", f"prefill {unit}", "saved", "deep image",
            f"token {small_unit}", "cache MB",
        ]  # fmt: skip
        body = []
        for row in rows:
            deep = row.deep_image / stock.deep_image if stock.deep_image else 0.0
            body.append(
                [
                    row.variant.name,
                    f"{row.forward.total / scale:.3f}",
                    f"{self.saved(row, prompt=prompt):.1%}",
                    f"{row.prefill.total / scale:.3f}",
                    f"{self.saved(row, 'prefill', prompt):.1%}",
                    f"{deep:.1%}",
                    f"{row.decode.total / small:.2f}",
                    f"{row.cache_bytes / 1e6:.4g}",
                ]
            )
        return head, body

    def encode(self) -> dict[str, Any]:
        """A table a prompt, with totals and shares."""
        return {
            "shape": encode(self.shape),
            "split": self.split,
            "value_bytes": self.value_bytes,
            "summary": self.summary(),
            "tables": [
                {"prompt": encode(prompt), "rows": [_row_to_dict(row, rows[0]) for row in rows]}
                for prompt, rows in zip(self.prompts, self.rows, strict=True)
            ],
            **({"facts": self.facts} if self.facts else {}),
        }

    @classmethod
    def decode(cls, values: dict[str, Any]) -> "FlopsResult":
        """Read the rows; totals, shares and summary are worked out again."""
        tables = values["tables"]
        return cls(
            decode(ModelShape, values["shape"]),
            values["split"],
            tuple(decode(Prompt, table["prompt"]) for table in tables),
            tuple(tuple(map(_row_from_dict, table["rows"])) for table in tables),
            values["value_bytes"],
            facts=values.get("facts", {}),
        )


def measure_flops(
    shape: ModelShape,
    prompts: Sequence[Prompt] = (Prompt(),),
    split: int | None = None,
    fusion_layers: int | tuple[int, ...] = 1,
    side_layers: int = 1,
    own: tuple[Routing | None, FastV | None] = (None, None),
    value_bytes: int = 2,
) -> FlopsResult:
    """FLOPs of the stock model and every variant.

    Args:
        shape: the model's sizes: `shape.shape_of(model)`, `shape.named("7b")`, or `files.read_shape(checkpoint)`.
        prompts: what each table is for.
        split: first routed layer; None: that of `own`, else 18/32 of the depth (the paper's 7B).
        fusion_layers: of LF's row: a count, or layer numbers.
        side_layers: depth of the side branch.
        own: routing and pruning that get a row of their own.
        value_bytes: of one number in the KV cache: 2 in half precision.

    Raises:
        SettingError: a split, or layers, that the model cannot take.
    """
    depth = shape.decoder.layers
    routing, pruning = own
    if split is None:
        split = int(routing.split) if routing is not None and isinstance(routing.split, int) else default_split(depth)
    if not 0 <= split < depth:
        raise SettingError(f"split = {split} is outside 0..{depth - 1}: the model has {depth} decoder layers")
    found = variants(split, fusion_layers, side_layers, depth)
    if routing is not None or pruning is not None:
        found.append(Variant(OWN, routing, pruning))
    tables = tuple(
        tuple(count_row(shape, variant, prompt, split, value_bytes) for variant in found) for prompt in prompts
    )
    return FlopsResult(shape, split, tuple(prompts), tables, value_bytes)


def variants(split: int, fusion_layers: int | tuple[int, ...], side_layers: int, depth: int) -> list[Variant]:
    """The rows of the table: the paper's Table 1, and the pruning baselines."""

    def routed(name: str, **more: Any) -> Routing:
        return Routing(variant=name, split=split, side_layers=side_layers, **more)

    lf = routed("lf", fusion_layers=fusion_layers)
    name = f"LF, K = {fusion_layers}" if isinstance(fusion_layers, int) else f"LF, K at {_numbers(fusion_layers)}"
    rows = [
        Variant("stock"), Variant("PC", routed("pc")), Variant("KV", routed("kv")), Variant(name, lf),
        Variant("ideal", routed("ideal")), Variant("VTW", Routing(variant="vtw", split=split)),
    ]  # fmt: skip
    if depth > 2:
        rows.append(Variant("FastV(2, ½)", None, FastV(2, 0.5)))
        if split >= 2:
            rows.append(Variant("LF + FastV(2, ½)", lf, FastV(2, 0.5)))
    return rows


def _numbers(layers: tuple[int, ...]) -> str:
    return ",".join(map(str, layers))


def count_row(shape: ModelShape, variant: Variant, prompt: Prompt, split: int, value_bytes: int = 2) -> Row:
    """One variant's row."""
    program = program_of(shape, variant.routing, variant.pruning)
    forward, prefill, decode = (count_flops(shape, program, prompt, mode) for mode in Mode)
    return Row(
        variant, forward, prefill, decode, deep_image_flops(shape, program, prompt, split),
        cache_bytes(shape, program, prompt, value_bytes),
    )  # fmt: skip


def _unit(value: float) -> tuple[float, str]:
    return next(((scale, name) for scale, name in _UNITS if value >= scale), _UNITS[-1])


def _say(row: Row) -> str:
    parts = []
    if row.variant.routing is not None:
        parts.append(f"{row.variant.routing.variant} with split {row.variant.routing.split}")
    if row.variant.pruning is not None:
        parts.append(f"FastV({row.variant.pruning.layer}, {row.variant.pruning.ratio})")
    return " and ".join(parts)


def _row_to_dict(row: Row, stock: Row) -> dict[str, Any]:
    variant = {
        "name": row.variant.name,
        "routing": None if row.variant.routing is None else to_dict(row.variant.routing),
        "pruning": None if row.variant.pruning is None else to_dict(row.variant.pruning),
    }
    passes = {name: getattr(row, name) for name in ("forward", "prefill", "decode")}
    return {
        "variant": variant,
        **{name: value.to_dict() for name, value in passes.items()},
        **{f"{name}_share": value.total / getattr(stock, name).total for name, value in passes.items()},
        "deep_image": row.deep_image,
        "cache_bytes": row.cache_bytes,
    }


def _row_from_dict(values: dict[str, Any]) -> Row:
    read = {k: from_dict(values["variant"][k], "flops") if values["variant"][k] else None for k in _METHODS}
    kept = [field.name for field in fields(Flops)]  # the others are totals
    passes = {p: decode(Flops, {name: values[p][name] for name in kept}) for p in ("forward", "prefill", "decode")}
    return Row(
        Variant(values["variant"]["name"], **read),
        **passes,
        deep_image=values["deep_image"],
        cache_bytes=values["cache_bytes"],
    )


_METHODS = ("routing", "pruning")
