"""What saturation.yaml names; the code is in llava_patch.evaluation."""

from llava_patch.evaluation.saturation_runs import (
    mean_mass,
    mean_transition_layer,
    process_results,
    recommended_split,
)
from llava_patch.evaluation.tasks import SaturationTask

__all__ = ["SaturationTask", "mean_mass", "mean_transition_layer", "process_results", "recommended_split"]
