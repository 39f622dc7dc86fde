"""What the R-Probe YAML files name; the code is in llava_patch.evaluation."""

from llava_patch.evaluation.rprobe_runs import fvu, mse, process_results, psnr, steps
from llava_patch.evaluation.tasks import RProbeTask

__all__ = ["RProbeTask", "fvu", "mse", "process_results", "psnr", "steps"]
