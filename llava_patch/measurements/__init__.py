"""The measurements behind the papers, one file or folder each.

The names below are what a notebook needs, loaded on first use.
"""

from typing import TYPE_CHECKING

_EXPORTS = {
    "compare_reach": "reach.measure",
    "make_batches": "gradients.measure",
    "measure_attention_maps": "attention_maps.measure",
    "measure_drift": "drift.measure",
    "measure_flops": "flops.result",
    "measure_fusion_attention": "fusion_attention.measure",
    "measure_gradients": "gradients.measure",
    "measure_reach": "reach.measure",
    "measure_saturation": "saturation.measure",
}
__all__ = [*_EXPORTS]

if TYPE_CHECKING:
    from llava_patch.measurements.attention_maps.measure import measure_attention_maps as measure_attention_maps
    from llava_patch.measurements.drift.measure import measure_drift as measure_drift
    from llava_patch.measurements.flops.result import measure_flops as measure_flops
    from llava_patch.measurements.fusion_attention.measure import measure_fusion_attention as measure_fusion_attention
    from llava_patch.measurements.gradients.measure import make_batches as make_batches
    from llava_patch.measurements.gradients.measure import measure_gradients as measure_gradients
    from llava_patch.measurements.reach.measure import compare_reach as compare_reach
    from llava_patch.measurements.reach.measure import measure_reach as measure_reach
    from llava_patch.measurements.saturation.measure import measure_saturation as measure_saturation


def __getattr__(name: str) -> object:
    """Load a public name on first use."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
