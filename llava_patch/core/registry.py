"""What the package can do, by name: the one list that everything else is derived from.

An entry names its module and attribute, which is loaded on first use, so that no layer imports one above it.
"""

import functools
import pkgutil
from typing import Any

KINDS: dict[str, str] = {
    "fusion": "llava_patch.fusion.attach:FusionMethod",
    "routing": "llava_patch.routing.attach:RoutingMethod",
    "pruning": "llava_patch.routing.attach:PruningMethod",
    "probe": "llava_patch.probe.auxiliary.attach:Auxiliary",
}
"""Keywords of `patch`, in the order in which they are named; each with the `core.method.Method` that carries it out."""
TRAINING_ONLY = ("probe",)
"""Kinds that no finished model needs: no checkpoint holds them, and only training puts them on."""
METHODS: dict[str, str] = {
    "SkipLinks": "llava_patch.fusion.skip_links:SkipLinks",
    "DenseConnector": "llava_patch.fusion.dense_connector:DenseConnector",
    "DirectFusion": "llava_patch.fusion.direct_fusion:DirectFusion",
    "DeepStack": "llava_patch.fusion.deep_stack:DeepStack",
    "Routing": "llava_patch.settings.routing:Routing",
    "FastV": "llava_patch.routing.fastv:FastV",
    "PyramidDrop": "llava_patch.routing.pyramid_drop:PyramidDrop",
    "SparseVLM": "llava_patch.routing.sparse_vlm:SparseVLM",
    "VisionZip": "llava_patch.routing.vision_zip:VisionZip",
    "PruMerge": "llava_patch.routing.pru_merge:PruMerge",
    "AuxiliaryProbe": "llava_patch.settings.auxiliary:AuxiliaryProbe",
}
"""Settings classes of the methods; a class says in KIND which keyword of `patch` takes it."""
# Commands, gin's bindings, the report's sections (in this order) and the lmms-eval tasks follow from this list.
MEASUREMENTS: dict[str, str] = {
    "saturation": "llava_patch.measurements.saturation.measurement:SaturationMeasurement",
    "attention_maps": "llava_patch.measurements.attention_maps.measurement:AttentionMapsMeasurement",
    "flops": "llava_patch.measurements.flops.measurement:FlopsMeasurement",
    "gradients": "llava_patch.measurements.gradients.measurement:GradientsMeasurement",
    "reach": "llava_patch.measurements.reach.measurement:ReachMeasurement",
    "drift": "llava_patch.measurements.drift.measurement:DriftMeasurement",
    "fusion_attention": "llava_patch.measurements.fusion_attention.measurement:FusionAttentionMeasurement",
}
# Further settings that gin binds, beside METHODS and those of the measurements.
SETTINGS: dict[str, str] = {
    "RProbe": "llava_patch.measurements.rprobe.settings:RProbe",
    "Report": "llava_patch.tools.report.settings:Report",
}
SWEEP = "llava_patch.tools.sweep.settings:Sweep"
AUTO_SPLIT = "llava_patch.measurements.saturation.auto_split:resolve_split"
"""Answers `Routing(split="auto")`: it measures the model, so it lies above `patch`."""
MEASURED = 'Routing(split="auto")'
"""The setting that `patch(samples=...)` is for."""


load = pkgutil.resolve_name
"""Gives what an entry names, such as "MODULE:ATTRIBUTE"."""


def methods(kind: str | None = None) -> dict[str, Any]:
    """The settings classes of the methods by name: of one kind, or of all."""
    found = {name: load(entry) for name, entry in METHODS.items()}
    return {name: cls for name, cls in found.items() if kind in (None, cls.KIND)}


@functools.cache
def measurement(name: str) -> Any:
    """A measurement (see `measurements.base.Measurement`) by its name in `MEASUREMENTS`."""
    return load(MEASUREMENTS[name])()


def settings() -> dict[str, Any]:
    """The settings that gin binds beside those of the methods: class by its name."""
    found = [measurement(name).settings for name in MEASUREMENTS] + [load(entry) for entry in SETTINGS.values()]
    return {cls.__name__: cls for cls in found if cls is not None}
