"""What saturation.yaml names; the code is in llava_patch.integrations.lmms_eval."""

from llava_patch.integrations.lmms_eval.saturation_runs import (
    mean_mass,
    mean_transition_layer,
    process_results,
    recommended_split,
)
from llava_patch.integrations.lmms_eval.tasks import SaturationTask

__all__ = ["SaturationTask", "mean_mass", "mean_transition_layer", "process_results", "recommended_split"]
