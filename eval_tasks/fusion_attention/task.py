"""What fusion_attention.yaml names; the code is in llava_patch.integrations.lmms_eval."""

from llava_patch.integrations.lmms_eval.fusion_attention_runs import heads, mass, process_results, ratio
from llava_patch.integrations.lmms_eval.tasks import FusionAttentionTask

__all__ = ["FusionAttentionTask", "heads", "mass", "process_results", "ratio"]
