"""Visual saturation."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_patch.measurements.saturation.measure import measure_saturation
from llava_patch.measurements.saturation.measurement import Saturation
from llava_patch.tools.report.context import Context
from llava_patch.tools.report.section import Found, Section, found_of


def _settings(context: Context) -> Saturation:
    settings: Saturation = context.counted(Saturation, context.settings.samples)
    return settings


def _recorded(context: Context) -> dict[str, Any]:
    return asdict(_settings(context))


def _run(context: Context, folder: Path) -> Found:
    settings = _settings(context)
    result = measure_saturation(context.subject.model, context.samples(settings.max_samples), settings)
    return found_of(
        result,
        folder,
        "saturation",
        "Three panels over the decoder layers: cosine of a layer's input and output, attention mass of text on the "
        "image, and KL of the logit lens.",
    )


SECTION = Section(
    "saturation",
    "Visual saturation",
    "From which layer on does the decoder no longer need its image tokens? Cosine near 1: a layer hardly turns the "
    "states. Attention mass: how much text looks at the image. KL: how far a layer's prediction is from the last.",
    _run,
    _recorded,
    lambda context: context.command("saturation run", "--samples", str(_settings(context).max_samples)),
)
