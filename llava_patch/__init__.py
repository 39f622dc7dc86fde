"""llava_patch: Detached Skip-Links, DPVR routing and R-Probe for LLaVA models, without forking or editing them.

Importing this package installs one lazy import hook and changes nothing else; the names below are loaded on first use.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing itself takes longer to import than everything here

from llava_patch.core.version import __version__ as __version__  # noqa: E402

_EXPORTS = {  # beside the methods, which the registry names
    "AttentionMaps": "measurements.attention_maps.measurement",
    "Drift": "measurements.drift.measurement",
    "FusionAttention": "measurements.fusion_attention.measurement",
    "Gradients": "measurements.gradients.measurement",
    "Handle": "patching.handle",
    "LlavaPatchError": "core.errors",
    "RProbe": "measurements.rprobe.settings",
    "Reach": "measurements.reach.measurement",
    "RegionCollator": "integrations.training.auxiliary",
    "Saturation": "measurements.saturation.result",
    "compare_probes": "measurements.rprobe.compare",
    "compare_reach": "measurements.reach.measure",
    "follow": "integrations.training.loop",
    "get_handle": "hosts.anatomy",
    "image_attention": "measurements.fusion_attention.measure",
    "inspect_checkpoint": "tools.inspect",
    "load": "patching.checkpoint",
    "load_subject": "data.loaded",
    "measure_attention_maps": "measurements.attention_maps.measure",
    "measure_drift": "measurements.drift.measure",
    "measure_flops": "measurements.flops.result",
    "measure_fusion_attention": "measurements.fusion_attention.measure",
    "measure_gradients": "measurements.gradients.measure",
    "measure_reach": "measurements.reach.measure",
    "measure_saturation": "measurements.saturation.measure",
    "patch": "patching.patch",
    "read_examples": "data.examples",
    "read_samples": "data.readers",
    "run_rprobe": "measurements.rprobe.fit",
    "write_run": "measurements.rprobe.output",
}

if TYPE_CHECKING:
    from llava_patch.core.errors import LlavaPatchError as LlavaPatchError
    from llava_patch.data.examples import read_examples as read_examples
    from llava_patch.data.loaded import load_subject as load_subject
    from llava_patch.data.readers import read_samples as read_samples
    from llava_patch.fusion.deep_stack import DeepStack as DeepStack
    from llava_patch.fusion.dense_connector import DenseConnector as DenseConnector
    from llava_patch.fusion.direct_fusion import DirectFusion as DirectFusion
    from llava_patch.fusion.skip_links import SkipLinks as SkipLinks
    from llava_patch.hosts.anatomy import get_handle as get_handle
    from llava_patch.integrations.training.auxiliary import RegionCollator as RegionCollator
    from llava_patch.integrations.training.loop import follow as follow
    from llava_patch.measurements.attention_maps.measure import measure_attention_maps as measure_attention_maps
    from llava_patch.measurements.attention_maps.measurement import AttentionMaps as AttentionMaps
    from llava_patch.measurements.drift.measure import measure_drift as measure_drift
    from llava_patch.measurements.drift.measurement import Drift as Drift
    from llava_patch.measurements.flops.result import measure_flops as measure_flops
    from llava_patch.measurements.fusion_attention.measure import image_attention as image_attention
    from llava_patch.measurements.fusion_attention.measure import measure_fusion_attention as measure_fusion_attention
    from llava_patch.measurements.fusion_attention.measurement import FusionAttention as FusionAttention
    from llava_patch.measurements.gradients.measure import measure_gradients as measure_gradients
    from llava_patch.measurements.gradients.measurement import Gradients as Gradients
    from llava_patch.measurements.reach.measure import compare_reach as compare_reach
    from llava_patch.measurements.reach.measure import measure_reach as measure_reach
    from llava_patch.measurements.reach.measurement import Reach as Reach
    from llava_patch.measurements.rprobe.compare import compare_probes as compare_probes
    from llava_patch.measurements.rprobe.fit import run_rprobe as run_rprobe
    from llava_patch.measurements.rprobe.output import write_run as write_run
    from llava_patch.measurements.rprobe.settings import RProbe as RProbe
    from llava_patch.measurements.saturation.measure import measure_saturation as measure_saturation
    from llava_patch.measurements.saturation.result import Saturation as Saturation
    from llava_patch.patching.checkpoint import load as load
    from llava_patch.patching.handle import Handle as Handle
    from llava_patch.patching.patch import patch as patch
    from llava_patch.routing.fastv import FastV as FastV
    from llava_patch.routing.pru_merge import PruMerge as PruMerge
    from llava_patch.routing.pyramid_drop import PyramidDrop as PyramidDrop
    from llava_patch.routing.sparse_vlm import SparseVLM as SparseVLM
    from llava_patch.routing.vision_zip import VisionZip as VisionZip
    from llava_patch.settings.auxiliary import AuxiliaryProbe as AuxiliaryProbe
    from llava_patch.settings.routing import Routing as Routing
    from llava_patch.tools.inspect import inspect_checkpoint as inspect_checkpoint


def __getattr__(name: str) -> object:
    """Load a public name on first use."""
    import importlib

    if name in _EXPORTS:
        return getattr(importlib.import_module(f"llava_patch.{_EXPORTS[name]}"), name)
    registry = importlib.import_module("llava_patch.core.registry")
    if name == "__all__":
        return ["__version__", *_EXPORTS, *registry.METHODS]
    if name in registry.METHODS:
        return registry.load(registry.METHODS[name])
    raise AttributeError(f"module 'llava_patch' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__getattr__("__all__"))  # type: ignore[call-overload]


from llava_patch.integrations import import_hook as _autostart  # noqa: E402 - after the names it may need

_autostart.install()
