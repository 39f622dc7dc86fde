"""Names that task.py of earlier versions imported, for copies of it; `runner.names` has them all."""

from llava_patch.integrations.lmms_eval.runner import names

_names = names("drift")
process_results = _names["process_results"]
image = _names["drift_image"]
text = _names["drift_text"]
