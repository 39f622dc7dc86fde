"""Text-to-image attention of the fusion layers' heads, trained against stock."""

from llava_patch.measurements.fusion_attention.measure import measure_fusion_attention, measure_fusion_attention_apart
from llava_patch.measurements.fusion_attention.result import FusionAttention, FusionAttentionResult

__all__ = [
    "FusionAttention",
    "FusionAttentionResult",
    "measure_fusion_attention",
    "measure_fusion_attention_apart",
]
