"""What drift.yaml names; the code is in llava_patch.evaluation."""

from llava_patch.evaluation.drift_runs import image, process_results, text
from llava_patch.evaluation.tasks import DriftTask

__all__ = ["DriftTask", "image", "process_results", "text"]
