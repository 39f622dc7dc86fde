"""What drift.yaml names: `Task`, `process_results`, and each metric's aggregation under the metric's name."""

from llava_patch.integrations.lmms_eval.runner import names

globals().update(names("drift"))
