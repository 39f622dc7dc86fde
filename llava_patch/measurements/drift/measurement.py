"""The drift measurement: what commands, report and lmms-eval ask of it."""

import base64
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.core.paths import named
from llava_patch.measurements.base import Measurement
from llava_patch.measurements.drift.result import Drift, DriftResult

if TYPE_CHECKING:
    from llava_patch.data.target import Target


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
    result = "llava_patch.measurements.drift.result:DriftResult"
    compares = True
    words = {"together": "--together/--apart"}  # noqa: RUF012

    metrics = {  # noqa: RUF012 - lowest median over the layers below the split
        "drift_image": lambda items: min(DriftMeasurement().pooled(items).image.median),
        "drift_text": lambda items: min(DriftMeasurement().pooled(items).text.median),
    }

    def measure(self, target: "Target", settings: Drift, folder: Path | None = None) -> DriftResult:
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
