"""What fusion_attention.yaml names; the code is in llava_patch.evaluation."""

from llava_patch.evaluation.fusion_attention_runs import heads, mass, process_results, ratio
from llava_patch.evaluation.tasks import FusionAttentionTask

__all__ = ["FusionAttentionTask", "heads", "mass", "process_results", "ratio"]
