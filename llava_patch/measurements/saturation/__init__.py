"""Visual saturation: from which layer on does the decoder no longer need its image tokens?

Source: "Late-Layer Fusion is Enough" (DPVR), section 3.1 and figure 2. Three curves over the layers, at image and text
positions apart: how much a layer turns the hidden states (cosine of its input and output), how much text attends to
the image, and how far each layer's logit-lens prediction is from the last one's. From them a split is recommended.
"""

from llava_patch.measurements.saturation.curves import Curves, RunningMean
from llava_patch.measurements.saturation.measure import measure_sample, measure_saturation, patch_on, unusable
from llava_patch.measurements.saturation.result import PatchOn, SaturationResult, summarise
from llava_patch.measurements.saturation.settings import Saturation

__all__ = [
    "Curves", "PatchOn", "RunningMean", "Saturation", "SaturationResult", "measure_sample",
    "measure_saturation", "patch_on", "summarise", "unusable",
]  # fmt: skip
