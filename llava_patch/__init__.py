"""llava_patch: Detached Skip-Links, DPVR routing and R-Probe for LLaVA models, without forking or editing them.

Importing this package installs one lazy import hook and changes nothing else; the names below are loaded on first use.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing itself takes longer to import than everything here

from llava_patch.core.version import __version__  # noqa: E402

_EXPORTS = {
    "patch": "llava_patch.patching.patch",
    "get_handle": "llava_patch.patching.handle",
    "Handle": "llava_patch.patching.handle",
    "load": "llava_patch.patching.checkpoint",
    "SkipLinks": "llava_patch.settings.methods",
    "DenseConnector": "llava_patch.settings.methods",
    "DirectFusion": "llava_patch.settings.methods",
    "DeepStack": "llava_patch.settings.methods",
    "Routing": "llava_patch.settings.methods",
    "FastV": "llava_patch.settings.methods",
    "AuxiliaryProbe": "llava_patch.settings.methods",
    "RProbe": "llava_patch.measurements.rprobe.settings",
    "Saturation": "llava_patch.measurements.saturation.result",
    "AttentionMaps": "llava_patch.measurements.attention_maps.result",
    "Drift": "llava_patch.measurements.drift.result",
    "FusionAttention": "llava_patch.measurements.fusion_attention.result",
    "Reach": "llava_patch.measurements.reach.result",
    "Gradients": "llava_patch.measurements.gradients.settings",
    "LlavaPatchError": "llava_patch.core.errors",
}
__all__ = [
    "AttentionMaps",
    "AuxiliaryProbe",
    "DeepStack",
    "DenseConnector",
    "DirectFusion",
    "Drift",
    "FastV",
    "FusionAttention",
    "Gradients",
    "Handle",
    "LlavaPatchError",
    "RProbe",
    "Reach",
    "Routing",
    "Saturation",
    "SkipLinks",
    "__version__",
    "get_handle",
    "load",
    "patch",
]

if TYPE_CHECKING:
    from llava_patch.core.errors import LlavaPatchError
    from llava_patch.measurements.attention_maps.result import AttentionMaps
    from llava_patch.measurements.drift.result import Drift
    from llava_patch.measurements.fusion_attention.result import FusionAttention
    from llava_patch.measurements.gradients.settings import Gradients
    from llava_patch.measurements.reach.result import Reach
    from llava_patch.measurements.rprobe.settings import RProbe
    from llava_patch.measurements.saturation.result import Saturation
    from llava_patch.patching.checkpoint import load
    from llava_patch.patching.handle import Handle, get_handle
    from llava_patch.patching.patch import patch
    from llava_patch.settings.methods import (
        AuxiliaryProbe,
        DeepStack,
        DenseConnector,
        DirectFusion,
        FastV,
        Routing,
        SkipLinks,
    )


def __getattr__(name: str) -> object:
    """Load a public name on first use."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'llava_patch' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)


from llava_patch.integrations import import_hook as _autostart  # noqa: E402 - after the names it may need

_autostart.install()
