"""Drift of the shallow layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from llava_patch.core.paths import named
from llava_patch.measurements.drift.measure import measure_drift_apart
from llava_patch.measurements.drift.result import Drift
from llava_patch.tools.report.context import Context
from llava_patch.tools.report.section import Found, Section, found_of


def _settings(context: Context) -> Drift:
    settings: Drift = context.counted(Drift, context.settings.samples)
    return settings


def _run(context: Context, folder: Path) -> Found:
    settings = _settings(context)
    result = measure_drift_apart(*context.openers(settings.max_samples), settings)
    result = dataclasses.replace(result, checkpoint=named(context.checkpoint), base=named(context.base))
    alt = "Median cosine between this checkpoint's and the base's hidden states over the decoder layers."
    return found_of(result, folder, "drift", alt)


def _recorded(context: Context) -> dict[str, Any]:
    return dataclasses.asdict(_settings(context))


SECTION = Section(
    "drift",
    "Drift of the lower layers",
    "Are the layers below the split still the base's? Cosine of both models' hidden states on the same inputs: 1 where "
    "they are the same.",
    _run,
    _recorded,
    lambda context: context.against_base("drift", "--samples", str(_settings(context).max_samples)),
    Context.why_no_base,
)
