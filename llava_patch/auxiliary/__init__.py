"""R-Probe as an auxiliary loss in training: the head, the regions of the data, and both hosts' trainers.

`RegionCollator` and `follow` are for Hugging Face's own Trainer; LLaVA's training script needs neither.
"""

from __future__ import annotations

_EXPORTS = {
    "Auxiliary": "llava_patch.auxiliary.attach",
    "RegionCollator": "llava_patch.auxiliary.collator",
    "follow": "llava_patch.auxiliary.trainer",
}
__all__ = ["Auxiliary", "RegionCollator", "follow"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from llava_patch.auxiliary.attach import Auxiliary
    from llava_patch.auxiliary.collator import RegionCollator
    from llava_patch.auxiliary.trainer import follow


def __getattr__(name: str) -> object:
    """Load a public name on first use: the handle needs one of these modules, and they need the handle."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'llava_patch.auxiliary' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
