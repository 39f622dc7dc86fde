"""The drift measurement: what commands, report and lmms-eval ask of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

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
