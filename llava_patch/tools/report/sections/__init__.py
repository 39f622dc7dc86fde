"""The sections of a report, one file each; every file has `SECTION`, and `NAMES` is their order."""

from __future__ import annotations

import importlib

from llava_patch.tools.report.section import Section

NAMES = (
    "saturation",
    "attention_maps",
    "flops",
    "gradients",
    "reach",
    "drift",
    "fusion_attention",
    "training_gradients",
    "training",
    "rprobe",
)


def sections() -> list[Section]:
    """All of them, in the report's order."""
    return [importlib.import_module(f"{__name__}.{name}").SECTION for name in NAMES]
