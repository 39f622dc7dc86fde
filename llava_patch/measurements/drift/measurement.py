"""The drift measurement: its settings, what it found, its figure, and what commands, report and lmms-eval ask of it."""

import base64
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_patch.core import plotting
from llava_patch.core.extras import optional
from llava_patch.core.paths import named
from llava_patch.data.target import Target
from llava_patch.measurements.base import Measurement, Result, drawn
from llava_patch.settings.checks import flag, integer, is_text, number, refused

SMALL = 0.002  # below this, differences from 1 are drawn themselves: at 1 - 1e-6 an axis of cosines cannot be read


@dataclass(frozen=True)
class Drift:
    """Settings of the drift measurement.

    Source: "Late-Layer Fusion is Enough" (DPVR), section 3.2.

    Attributes:
        base: what to compare with where --base does not say it; "": what the checkpoint's record names.
        split: s, how many layers are compared (0..s-1); None: those below the split of a routed or pruned
            model, or all.
        together: keep both models in memory. Otherwise one runs after the other, and the first one's hidden states wait
            on disk.
        store_gb: how much they may take there, in 10^9 bytes; a run that would need more is refused.
        max_samples: stop after so many usable samples; None: take all.
    """

    base: str = ""
    split: int | None = None
    together: bool = False
    store_gb: float = 20.0
    max_samples: int | None = None

    def __post_init__(self) -> None:
        if not is_text(self.base):
            raise refused("Drift", "base", self.base, "a checkpoint's folder or name")
        flag("Drift", "together", self.together)
        for name in ("split", "max_samples"):
            if getattr(self, name) is not None:
                integer("Drift", name, getattr(self, name), 1)
        number("Drift", "store_gb", self.store_gb, above=0)


DEFAULTS = Drift()


@dataclass(frozen=True)
class DriftCurves:
    """Cosines of one kind of position."""

    median: list[float]  # per layer 0..s-1, over all positions of all samples; exact
    low: list[float]  # the same, but 5 % of the positions lie below
    input: float  # median at the input of layer 0: what tower, projector and embeddings changed
    input_low: float  # there too, 5 % of the positions lie below
    positions: int  # how many


@dataclass(frozen=True)
class DriftResult(Result):
    """What was measured."""

    NAME = TITLE = "drift"
    FIGURE = "llava_patch.measurements.drift.measurement:drift_figure"

    image: DriftCurves  # cosines at image positions
    text: DriftCurves  # at text positions (everything that is not image)
    n_layers: int  # L, of the whole decoder
    split: int | None  # s where the model routes or prunes; None: nothing leaves the decoder, or s was set
    samples: int
    skipped: int = 0  # samples without an image
    checkpoint: str = ""  # what was measured
    base: str = ""  # what with
    settings: Drift = field(default_factory=Drift)
    prunes: bool = False  # whether `split` is the first layer without pruned image tokens, not a routed model's split

    @property
    def layers(self) -> int:
        """How many layers were compared."""
        return len(self.image.median)

    def derived(self) -> dict[str, Any]:
        """What was measured, in the order in which results of other checkpoints are refused."""
        return {"sources": [self.checkpoint, self.base]}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows: a layer each."""
        curves = (self.image, self.text)
        medians, lows = ([c.input, *c.median] for c in curves), ([c.input_low, *c.low] for c in curves)
        names = ["input", *map(str, range(self.layers))]
        rows = [[name, *(f"{v:.6f}" for v in values)] for name, *values in zip(names, *medians, *lows, strict=True)]
        return ["layer", "image", "text", "image, worst 5 %", "text, worst 5 %"], rows

    def finding(self) -> str:
        """Whether the lower layers are the base's, and where a change comes from."""
        kinds = {"image": self.image, "text": self.text}
        kind, worst = min(kinds.items(), key=lambda item: min(item[1].median))
        lowest = min(worst.median)
        if self._same():
            return "The lower layers are the base's: nothing has drifted."
        if lowest == 1.0:
            return "Undecided: half of the positions are the base's exactly, but some are not (worst 5 % in the table)."
        layer, brought = worst.median.index(lowest), 1 - worst.input >= (1 - lowest) / 2
        source = {"image": "the vision tower and the projector", "text": "the token embeddings"}[kind]
        where = f"most of it comes in from {source}" if brought else "most of it appears in the decoder's layers"
        return f"The lower layers have drifted, most at {kind} positions of layer {layer}; {where}."

    def caution(self) -> str:
        """What a cosine does not say."""
        return (
            ""
            if self._same()
            else (
                "That states turned does not say that answers got worse: "
                "judge both on a task. Layers that are the base's own "
                "can make a change of their input grow."
            )
        )

    def _same(self) -> bool:
        """Whether every cosine that is known is 1."""
        curves = (self.image, self.text)
        return min(v for c in curves for v in (*c.median, *c.low, c.input_low)) == 1.0

    def summary(self) -> str:
        """What was found, in one or two sentences."""
        image, text = (min(curves.median) for curves in (self.image, self.text))
        over = f"over {self.samples} samples, layers 0..{self.layers - 1}"
        if self._same():
            return f"No drift: hidden states are the base's, cosine 1 at image and text positions, {over}."
        return (
            f"Lowest median cosine with the base: image {image:.6f} (layer {self.image.median.index(image)}), text "
            f"{text:.6f} (layer {self.text.median.index(text)}), {over}; 5 % of the positions lie below "
            f"{self.image.low[self.image.median.index(image)]:.6f} and "
            f"{self.text.low[self.text.median.index(text)]:.6f} "
            "there. At the input of layer 0: image "
            f"{self.image.input:.6f}, text {self.text.input:.6f}."
        )


@drawn
def drift_figure(result: DriftResult) -> Any:
    """Median cosine over the layers at image and text positions; a pale band down to the lowest 5 %.

    Where all cosines are within `SMALL` of 1, their distance from 1 is drawn instead.
    """
    figure, (axis,) = plotting.panels()
    curves = (
        (result.image, plotting.IMAGE, "image positions", "o", 5, "none"),
        (result.text, plotting.TEXT, "text positions", "s", 2.5, plotting.TEXT),
    )
    layers = range(-1, result.layers)
    lowest = min(min(c.input, c.input_low, *c.median, *c.low) for c, *_ in curves)
    distance = 0 < 1 - lowest < SMALL
    for found, color, name, mark, size, fill in curves:
        median, low = [found.input, *found.median], [found.input_low, *found.low]
        if distance:
            median, low = [1 - v for v in median], [1 - v for v in low]
        axis.plot(layers, median, color=color, marker=mark, ms=size, mfc=fill, label=name)
        axis.fill_between(layers, low, median, color=color, alpha=0.15, lw=0)
    axis.fill_between([], [], [], color="0.6", alpha=0.4, lw=0, label="median to worst 5 %")
    if distance:
        axis.set_ylabel("1 - cosine with the base")
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
        axis.set_ylim(bottom=-0.04 * (1 - lowest))
    else:
        room = 0.04 * (1 - lowest)
        axis.set(ylabel="cosine with the base", ylim=(lowest - room, 1 + room) if room else (0.9, 1.02))
    leaves = result.split == result.layers
    last = result.layers if leaves else result.layers - 1
    axis.set(xlim=(-1.5, last + 0.5), xlabel="decoder layer (in: input of layer 0)")
    numbers = optional("matplotlib.ticker").MaxNLocator(nbins=10, integer=True).tick_values(0, max(last, 1))
    shown = sorted({int(v) for v in numbers if 0 <= v <= last} | ({last} if leaves else set()))
    axis.set_xticks([-1, *shown], ["in", *map(str, shown)])
    if leaves:
        (plotting.mark_pruning if result.prunes else plotting.mark_split)(axis, result.split)
    axis.set_title(f"Drift of the shallow layers, {result.samples} samples")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


class DriftMeasurement(Measurement):
    """Are a trained checkpoint's lower layers still the base's?

    Median cosine of both models' hidden states, layer by layer below the
    split, image and text positions apart. The models are loaded one after
    the other; the first one's states wait on disk (--store-gb).
    OUTPUT gets drift.json and drift.png.
    """

    name = "drift"
    title = "Drift of the lower layers"
    about = (
        "Are the layers below the split still the base's? Cosine of both models' hidden states on the same inputs: 1 "
        "where they are the same."
    )
    alt = "Median cosine between this checkpoint's and the base's hidden states over the decoder layers."
    settings = Drift
    result = "llava_patch.measurements.drift.measurement:DriftResult"
    compares = True
    aside = ("Drift.base", "Drift.store_gb", "Drift.together")
    words = {"together": "--together/--apart"}  # noqa: RUF012

    metrics = {  # noqa: RUF012 - lowest median over the layers below the split
        "drift_image": lambda items: min(DriftMeasurement().pooled(items).image.median),
        "drift_text": lambda items: min(DriftMeasurement().pooled(items).text.median),
    }

    def measure(self, target: Target, settings: Drift, folder: Path | None = None) -> DriftResult:
        """Compare the checkpoint with its base."""
        from llava_patch.measurements.drift.measure import measure_drift, measure_drift_apart

        own, base = target.openers(settings.max_samples)
        if settings.together:
            (model, samples), (base_model, base_samples) = own(), base()
            result = measure_drift(model, base_model, samples, settings, base_samples=base_samples)
        else:
            result = measure_drift_apart(own, base, settings)
        return dataclasses.replace(result, checkpoint=named(target.checkpoint), base=named(target.base))

    def document(
        self, anatomies: Sequence[Any], samples: Sequence[dict[str, Any]], settings: Drift, number: int
    ) -> dict[str, Any]:
        """The document's cosines, so that medians are over all positions of all documents.

        They are packed: 16 digits a number in JSON would make the samples log four times as long.
        """
        import numpy as np

        from llava_patch.measurements.drift.measure import DriftMeter
        from llava_patch.measurements.passes import evaluating

        own, base = anatomies
        with DriftMeter(settings) as meter, evaluating(own.model), evaluating(base.model):
            meter.begin(own)
            meter.check(base)
            one, other = (meter.read(a, s) for a, s in zip(anatomies, samples, strict=True))
            values, image = meter.add(number, one, other)
        return {
            "cosines": base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode("ascii"),
            "rows": len(values),
            "image": image.astype(int).tolist(),
            "n_layers": meter.n_layers,
            "split": meter.split,
            "prunes": meter.prunes,
        }

    def entries(self, item: dict[str, Any]) -> dict[str, Any]:
        """The document's own lowest medians."""
        return {name: {"lowest_median": lowest([item]), **item} for name, lowest in self.metrics.items()}

    def pooled(self, items: Sequence[dict[str, Any]]) -> DriftResult:
        """The result over all positions of all documents."""
        import numpy as np

        from llava_patch.measurements.drift.measure import DriftMeter

        first = items[0]
        with DriftMeter(Drift(**first["settings"])) as meter:
            meter.n_layers, meter.split, meter.prunes = first["n_layers"], first["split"], first["prunes"]
            for item in items:
                values = np.frombuffer(base64.b64decode(item["cosines"]), dtype="<f4").reshape(item["rows"], -1)
                meter.add_cosines(values, np.array(item["image"], dtype=bool))
            meter.samples = len(items)
            return meter.result(first["checkpoint"], first["base"])
