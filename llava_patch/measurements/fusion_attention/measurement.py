"""The fusion attention measurement: what commands, report and lmms-eval ask of it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.core.paths import named
from llava_patch.measurements.base import Measurement
from llava_patch.measurements.fusion_attention.result import FusionAttention, FusionAttentionResult, mean

if TYPE_CHECKING:
    from llava_patch.data.target import Target


def _mass(items: Sequence[dict[str, Any]]) -> float:
    """Text-to-image attention mass, mean over heads, fusion layers and documents."""
    return mean([value for heads in FusionAttentionMeasurement().pooled(items).trained for value in heads])


def _ratio(items: Sequence[dict[str, Any]]) -> float | None:
    """That mass divided by the base's; None where the base's is zero."""
    stock = mean([value for heads in FusionAttentionMeasurement().pooled(items).stock for value in heads])
    return _mass(items) / stock if stock else None


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
    result = "llava_patch.measurements.fusion_attention.result:FusionAttentionResult"
    compares = True

    metrics = {  # noqa: RUF012
        "fusion_attention_mass": _mass,
        "fusion_attention_ratio": _ratio,
        "heads_above_twice_stock": _heads,
    }

    def measure(self, target: "Target", settings: FusionAttention, folder: Path | None = None) -> FusionAttentionResult:
        """Compare the checkpoint's fusion layers with the base's."""
        from llava_patch.measurements.fusion_attention.measure import measure_fusion_attention_apart

        result = measure_fusion_attention_apart(*target.openers(settings.max_samples), settings)
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
