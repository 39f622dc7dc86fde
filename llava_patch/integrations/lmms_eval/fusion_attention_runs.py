"""Names that task.py of earlier versions imported, for copies of it; `runner.names` has them all."""

from llava_patch.integrations.lmms_eval.runner import names

_names = names("fusion_attention")
process_results = _names["process_results"]
mass = _names["fusion_attention_mass"]
ratio = _names["fusion_attention_ratio"]
heads = _names["heads_above_twice_stock"]
