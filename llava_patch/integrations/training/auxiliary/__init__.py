"""R-Probe as an auxiliary loss in training: the regions of the data, and both hosts' trainers.

`RegionCollator` and `follow` are for Hugging Face's own Trainer; LLaVA's training script needs neither.
"""

from llava_patch.integrations.training.auxiliary.data import RegionCollator
from llava_patch.integrations.training.auxiliary.trainer import follow
from llava_patch.probe.auxiliary.attach import Auxiliary

__all__ = ["Auxiliary", "RegionCollator", "follow"]
