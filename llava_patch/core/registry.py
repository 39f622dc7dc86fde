"""What the package can do, by name: the one list that everything else is derived from.

An entry names its module and attribute, which is loaded on first use, so that no layer imports one above it.
"""

from __future__ import annotations

import importlib
from typing import Any

# Settings that gin binds, beside those of the methods in settings/methods.py.
MEASUREMENTS: dict[str, str] = {
    "AttentionMaps": "llava_patch.measurements.attention_maps.result:AttentionMaps",
    "Drift": "llava_patch.measurements.drift.result:Drift",
    "FusionAttention": "llava_patch.measurements.fusion_attention.result:FusionAttention",
    "Gradients": "llava_patch.measurements.gradients.settings:Gradients",
    "RProbe": "llava_patch.measurements.rprobe.settings:RProbe",
    "Reach": "llava_patch.measurements.reach.settings:Reach",
    "Report": "llava_patch.tools.report.settings:Report",
    "Saturation": "llava_patch.measurements.saturation.settings:Saturation",
}
SWEEP = "llava_patch.tools.sweep.settings:Sweep"
AUTO_SPLIT = "llava_patch.measurements.saturation.auto_split:resolve_split"
"""Answers `Routing(split="auto")`: it measures the model, so it lies above `patch`."""


def load(entry: str) -> Any:
    """What an entry names.

    Args:
        entry: "MODULE:ATTRIBUTE".
    """
    module, _, attribute = entry.partition(":")
    return getattr(importlib.import_module(module), attribute)
