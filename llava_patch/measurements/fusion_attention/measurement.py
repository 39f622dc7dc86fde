"""The fusion attention measurement: its settings, what it found and its figure, and what is asked of it."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_patch.core import plotting
from llava_patch.core.paths import named
from llava_patch.data.target import Target
from llava_patch.measurements.base import Measurement, Result, drawn
from llava_patch.settings.checks import integer, is_text, refused

COLUMNS = 2
NUMBERED = 16  # up to so many heads, each one's number stands under it


@dataclass(frozen=True)
class FusionAttention:
    """Settings of the fusion attention measurement.

    Source: "Late-Layer Fusion is Enough" (DPVR), section 3.2.

    Attributes:
        base: what to compare with where --base does not say it; "": what the checkpoint's record names.
        layers: decoder layers; None: the routed model's fusion layers (pc and kv: all deep layers), else the last.
        max_samples: stop after so many usable samples; None: take all.
        chunk: attention queries held at a time (memory against speed).
    """

    base: str = ""
    layers: tuple[int, ...] | None = None
    max_samples: int | None = None
    chunk: int = 128

    def __post_init__(self) -> None:
        if not is_text(self.base):
            raise refused("FusionAttention", "base", self.base, "a checkpoint's folder or name")
        integer("FusionAttention", "chunk", self.chunk, 1)
        if self.max_samples is not None:
            integer("FusionAttention", "max_samples", self.max_samples, 1)
        if self.layers is None:
            return
        if not isinstance(self.layers, (tuple, list)) or not self.layers:
            raise refused("FusionAttention", "layers", self.layers, "layer numbers, as (31,)")
        for layer in self.layers:
            integer("FusionAttention", "layers", layer, 0)
        object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))


DEFAULTS = FusionAttention()


@dataclass(frozen=True)
class FusionAttentionResult(Result):
    """Mass: attention probability that text behind the image puts on image keys, mean over samples."""

    NAME, TITLE = "fusion_attention", "fusion attention"
    FIGURE = "llava_patch.measurements.fusion_attention.measurement:fusion_attention_figure"

    layers: list[int]  # numbers
    trained: list[list[float]]  # [layers][heads], mass in the checkpoint
    stock: list[list[float]]  # [layers][heads], mass in the base
    n_layers: int  # L
    samples: int
    skipped: int = 0  # samples without an image or without text after it
    checkpoint: str = ""  # what was measured
    base: str = ""  # what with
    settings: FusionAttention = field(default_factory=FusionAttention)

    def mean_ratio(self, index: int) -> float:
        """Trained mean over heads divided by the stock one, in the index-th layer; NaN for 0 / 0."""
        return _ratio(mean(self.trained[index]), mean(self.stock[index]))

    def ratios(self, index: int) -> list[float]:
        """The same of each head."""
        return [_ratio(a, b) for a, b in zip(self.trained[index], self.stock[index], strict=True)]

    def above_twice(self, index: int) -> int:
        """Heads whose mass is more than twice their own in the base."""
        return sum(a > 2 * b for a, b in zip(self.trained[index], self.stock[index], strict=True))

    def per_layer(self) -> list[dict[str, Any]]:
        """What there is to say of each layer, as files have it."""
        return [
            {
                "layer": layer,
                "trained": trained,
                "stock": stock,
                "trained_mean": mean(trained),
                "stock_mean": mean(stock),
                "mean_ratio": self.mean_ratio(i),
                "head_ratios": self.ratios(i),
                "highest_head_trained": trained.index(max(trained)),
                "highest_head_stock": stock.index(max(stock)),
                "highest_mass_trained": max(trained),
                "highest_mass_stock": max(stock),
                "heads_above_twice_stock": self.above_twice(i),
            }
            for i, (layer, trained, stock) in enumerate(zip(self.layers, self.trained, self.stock, strict=True))
        ]

    def encode(self) -> dict[str, Any]:
        """A dictionary a layer, with what follows from its masses."""
        values = super().encode()
        del values["trained"], values["stock"]
        return {"sources": [self.checkpoint, self.base], **values, "layers": self.per_layer()}

    @classmethod
    def decode(cls, values: dict[str, Any]) -> "FusionAttentionResult":
        """Read the masses; what follows from them is worked out again."""
        for name in ("skipped", "checkpoint", "base", "settings"):  # what every file says, though they have defaults
            values[name]
        names = {"layers": "layer", "trained": "trained", "stock": "stock"}
        return super().decode({**values, **{k: [one[v] for one in values["layers"]] for k, v in names.items()}})

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows: a layer each."""
        rows = [
            [
                f"{one['layer']}",
                f"{one['trained_mean']:.4f}",
                f"{one['stock_mean']:.4f}",
                f"{one['mean_ratio']:.2f}",
                f"{one['highest_mass_trained']:.3f} ({one['highest_head_trained']})",
                f"{one['highest_mass_stock']:.3f} ({one['highest_head_stock']})",
                f"{one['heads_above_twice_stock']} of {len(one['trained'])}",
            ]
            for one in self.per_layer()
        ]
        return ["layer", "mean", "stock", "ratio", "highest (head)", "stock's", "over twice"], rows

    def finding(self) -> str:
        """Whether the layers have learned to look at the image, by the paper's count of heads above twice stock."""
        heads, above = sum(map(len, self.trained)), sum(self.above_twice(i) for i in range(len(self.layers)))
        own, base = (mean([mass for layer in side for mass in layer]) for side in (self.trained, self.stock))
        where = f"layer{'s' * (len(self.layers) > 1)} {', '.join(map(str, self.layers))}"
        if own == 0:
            return f"Text does not look at the image at all in {where}."
        if above and own < base:
            return (
                f"Undecided: in {where} {above} of {heads} heads look at the image more than twice as much as the "
                "base's, but all together less."
            )
        if above:
            return (
                f"Text has learned to look at the image in {where}: {above} of {heads} heads, more than twice the base."
            )
        if own < base:
            return f"Text looks at the image less than in the base in {where}: late fusion has not learned to use it."
        return f"Undecided: in {where} text looks at the image no less than in the base, but no head twice as much."

    def caution(self) -> str:
        """What attention does not say."""
        return (
            f"Means over {self.samples} samples, without an interval. Attention says where a layer looks, not what the "
            "answer takes from it: exchange the image to see that."
        )

    def summary(self) -> str:
        """What was found, in a sentence a layer."""
        lines = []
        for layer, mean, stock, ratio, highest, base_highest, above in self.table()[1]:
            times = "against" if ratio == "nan" else f"{ratio} times"
            lines.append(
                f"Layer {layer}: text puts {mean} of its attention on the image, {times} stock's {stock}; highest head "
                f"{highest.replace('(', '(head ')}, stock's {base_highest.replace('(', '(head ')}; {above} heads are "
                "above twice stock."
            )
        return f"{' '.join(lines)} ({self.samples} samples)"


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def _ratio(one: float, other: float) -> float:
    if other == 0:
        return math.nan if one == 0 else math.inf
    return one / other


@drawn
def fusion_attention_figure(result: FusionAttentionResult) -> Any:
    """A panel a layer: each head's mass, sorted by stock's; trained as bars, stock as points, its double as dashes."""
    count = len(result.layers)
    columns = min(COLUMNS, count)
    figure, axes = plotting.panels(-(-count // columns), columns)
    for index, axis in enumerate(axes):
        if index < count:
            _panel(axis, result, index)
        else:
            axis.set_visible(False)
    figure.suptitle(f"Text-to-image attention by head, {result.samples} samples", fontsize=8.5)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _panel(axis: Any, result: FusionAttentionResult, index: int) -> None:
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
    what = "head number" if heads <= NUMBERED else f"{heads} heads"
    axis.set(xlabel=f"{what}, sorted by stock's mass", ylabel="mass on image keys (probability)")
    top = 1.08 * max(*own, *base, 1e-9)  # twice stock may lie above, where nothing reaches it
    axis.set(xlim=(-0.7, heads - 0.3), ylim=(0, top))
    axis.grid(visible=False, axis="x")


def _masses(items: Sequence[dict[str, Any]]) -> list[float]:
    """Text-to-image attention mass, mean over heads, fusion layers and documents: the checkpoint's, and the base's."""
    result = FusionAttentionMeasurement().pooled(items)
    return [mean([value for heads in layers for value in heads]) for layers in (result.trained, result.stock)]


def _mass_ratio(items: Sequence[dict[str, Any]]) -> float | None:
    """One divided by the other; None where the base's is zero."""
    trained, stock = _masses(items)
    return trained / stock if stock else None


def _heads(items: Sequence[dict[str, Any]]) -> int:
    """Heads of the fusion layers that are above twice their own mass in the base."""
    result = FusionAttentionMeasurement().pooled(items)
    return sum(result.above_twice(index) for index in range(len(result.layers)))


class FusionAttentionMeasurement(Measurement):
    """Has the fusion layer learned to look at the image, and which heads?

    Attention that text behind the image puts on it, head by head, against
    the base's same layer. The models are loaded one after the other.
    OUTPUT gets fusion_attention.json and fusion_attention.png.
    """

    name = "fusion_attention"
    title = "Attention at the fusion layer"
    about = (
        "Has the layer that sees both streams learned to look at the image, and with which heads? Attention that text "
        "puts on the image, beside the base's same layer."
    )
    alt = "Attention mass on the image, head by head, in this checkpoint and in the base."
    settings = FusionAttention
    result = "llava_patch.measurements.fusion_attention.measurement:FusionAttentionResult"
    compares = True
    aside = ("FusionAttention.base", "FusionAttention.chunk")

    metrics = {  # noqa: RUF012
        "fusion_attention_mass": lambda items: _masses(items)[0],
        "fusion_attention_ratio": _mass_ratio,
        "heads_above_twice_stock": _heads,
    }

    def measure(self, target: Target, settings: FusionAttention, folder: Path | None = None) -> FusionAttentionResult:
        """Compare the checkpoint's fusion layers with the base's."""
        from llava_patch.measurements.fusion_attention.measure import MassMeter

        result = MassMeter(settings).apart(*target.openers(settings.max_samples))
        return dataclasses.replace(result, checkpoint=named(target.checkpoint), base=named(target.base))

    def document(
        self, anatomies: Sequence[Any], samples: Sequence[dict[str, Any]], settings: FusionAttention, number: int
    ) -> dict[str, Any]:
        """The document's result."""
        from llava_patch.measurements.fusion_attention.measure import measure_fusion_attention

        (own, base), (sample, base_sample) = anatomies, samples
        found = measure_fusion_attention(own.model, base.model, [sample], settings, False, [base_sample])
        return {"result": found.to_dict()}

    def pooled(self, items: Sequence[dict[str, Any]]) -> FusionAttentionResult:
        """The mean over documents, each of which counts the same."""
        found = [FusionAttentionResult.from_dict(item["result"]) for item in items]
        trained, stock = (
            [[mean(heads) for heads in zip(*layers, strict=True)] for layers in zip(*parts, strict=True)]
            for parts in ([one.trained for one in found], [one.stock for one in found])
        )
        first, settings = items[0], FusionAttention(**items[0]["settings"])
        known = {"checkpoint": first["checkpoint"], "base": first["base"], "settings": settings}
        return dataclasses.replace(found[0], trained=trained, stock=stock, samples=len(found), **known)
