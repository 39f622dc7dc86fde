"""R-Probe as an auxiliary loss in training: the head, the regions of the data, and both hosts' trainers.

`RegionCollator` and `follow` are for Hugging Face's own Trainer; LLaVA's training script needs neither.
"""

from __future__ import annotations

_EXPORTS = {
    "Auxiliary": "llava_patch.probe.auxiliary.attach",
    "RegionCollator": "llava_patch.integrations.training.auxiliary.collator",
    "follow": "llava_patch.integrations.training.auxiliary.trainer",
}
__all__ = ["Auxiliary", "RegionCollator", "follow"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from llava_patch.integrations.training.auxiliary.collator import RegionCollator
    from llava_patch.integrations.training.auxiliary.trainer import follow
    from llava_patch.probe.auxiliary.attach import Auxiliary


def __getattr__(name: str) -> object:
    """Load a public name on first use: the handle needs one of these modules, and they need the handle."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'llava_patch.integrations.training.auxiliary' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
