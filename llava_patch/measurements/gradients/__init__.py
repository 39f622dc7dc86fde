"""Gradient statistics: what reaches a vision block through the skip taps, and what through the main path.

Source: "Detached Skip-Links and R-Probe", section 4 and appendix C. `decompose` splits one step's gradient, `Window`
sums them up, `integrations.training.gradients.follow` does both while a Trainer trains, `GradientsResult` is what came
out.
"""

from llava_patch.measurements.gradients.decompose import decompose, measured_block
from llava_patch.measurements.gradients.result import GradientsResult, StepLog
from llava_patch.measurements.gradients.settings import Gradients
from llava_patch.measurements.gradients.state import load_window, save_window
from llava_patch.measurements.gradients.statistics import Moments, Step, Window, transition_step

__all__ = [
    "Gradients",
    "GradientsResult",
    "Moments",
    "Step",
    "StepLog",
    "Window",
    "decompose",
    "load_window",
    "measured_block",
    "save_window",
    "transition_step",
]
