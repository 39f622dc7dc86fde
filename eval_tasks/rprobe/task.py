"""What the R-Probe YAML files name; the code is in llava_patch.integrations.lmms_eval."""

from llava_patch.integrations.lmms_eval.rprobe_runs import fvu, mse, process_results, psnr, steps
from llava_patch.integrations.lmms_eval.tasks import RProbeTask

__all__ = ["RProbeTask", "fvu", "mse", "process_results", "psnr", "steps"]
