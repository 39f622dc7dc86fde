"""What drift.yaml names; the code is in llava_patch.integrations.lmms_eval."""

from llava_patch.integrations.lmms_eval.drift_runs import image, process_results, text
from llava_patch.integrations.lmms_eval.tasks import DriftTask

__all__ = ["DriftTask", "image", "process_results", "text"]
