"""Names that task.py of earlier versions imported, for copies of it; `runner.names` has them all."""

from llava_patch.integrations.lmms_eval.runner import names

_names = names("saturation")
process_results = _names["process_results"]
mean_mass = _names["attention_mass_final"]
mean_transition_layer = _names["vision_transition_layer"]
recommended_split = _names["recommended_split"]
