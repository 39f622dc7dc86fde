"""The fusion attention measurement: what commands, report and lmms-eval ask of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from llava_patch.core.paths import named
from llava_patch.measurements.base import Measurement
from llava_patch.measurements.fusion_attention.result import FusionAttention, FusionAttentionResult

if TYPE_CHECKING:
    from llava_patch.data.target import Target


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
    result = "llava_patch.measurements.fusion_attention.result:FusionAttentionResult"
    compares = True

    def measure(self, target: "Target", settings: FusionAttention, folder: Path | None = None) -> FusionAttentionResult:
        """Compare the checkpoint's fusion layers with the base's."""
        from llava_patch.measurements.fusion_attention.measure import measure_fusion_attention_apart

        result = measure_fusion_attention_apart(*target.openers(settings.max_samples), settings)
        return dataclasses.replace(result, checkpoint=named(target.checkpoint), base=named(target.base))
