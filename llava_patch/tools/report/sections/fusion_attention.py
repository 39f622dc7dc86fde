"""Attention on the image at the fusion layer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from llava_patch.core.paths import named
from llava_patch.measurements.fusion_attention.measure import measure_fusion_attention_apart
from llava_patch.measurements.fusion_attention.result import FusionAttention
from llava_patch.tools.report.context import Context
from llava_patch.tools.report.section import Found, Section, found_of


def _settings(context: Context) -> FusionAttention:
    settings: FusionAttention = context.counted(FusionAttention, context.settings.samples)
    return settings


def _run(context: Context, folder: Path) -> Found:
    settings = _settings(context)
    result = measure_fusion_attention_apart(*context.openers(settings.max_samples), settings)
    result = dataclasses.replace(result, checkpoint=named(context.checkpoint), base=named(context.base))
    alt = "Attention mass on the image, head by head, in this checkpoint and in the base."
    return found_of(result, folder, "fusion_attention", alt)


def _recorded(context: Context) -> dict[str, Any]:
    return dataclasses.asdict(_settings(context))


SECTION = Section(
    "fusion_attention",
    "Attention at the fusion layer",
    "Has the layer that sees both streams learned to look at the image, and with which heads? Attention that text puts "
    "on the image, beside the base's same layer.",
    _run,
    _recorded,
    lambda context: context.against_base("fusion-attention", "--samples", str(_settings(context).max_samples)),
    Context.why_no_base,
)
