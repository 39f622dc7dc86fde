"""Attention maps of the vision tower."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.core.paths import named
from llava_patch.data.base_model import load_base
from llava_patch.data.model_inputs import ModelInputs
from llava_patch.measurements.attention_maps import AttentionMaps, measure_attention_maps
from llava_patch.tools.report.context import Context
from llava_patch.tools.report.section import Found, Section, found_of

if TYPE_CHECKING:
    from llava_patch.data.examples import Example
    from llava_patch.data.loaded import LoadedCheckpoint
    from llava_patch.measurements.attention_maps import AttentionMapsResult


def _settings(context: Context) -> AttentionMaps:
    settings: AttentionMaps = context.counted(AttentionMaps, context.settings.maps)
    return settings


def _run(context: Context, folder: Path) -> Found:
    settings = _settings(context)
    examples = context.examples(settings.max_samples)
    own = _label(context.checkpoint)
    result = _measure(context.subject, examples, settings, own, named(context.checkpoint))
    if context.inspection.trained_tower and context.why_no_base() is None:  # an untrained tower is the base's own
        below = _label(context.base) + (" (base)" if _label(context.base) == own else "")
        context.release()  # one model in memory at a time
        other = load_base(context.base, context.device, context.dtype)
        result = result.beside(_measure(other, examples, settings, below, named(context.base)))
    alt = "A row an image: the image, and beside it which patches the block looks at."
    return found_of(result, folder, "attention_maps", alt)


def _measure(
    subject: "LoadedCheckpoint", examples: "list[Example]", settings: AttentionMaps, label: str, source: str
) -> "AttentionMapsResult":
    return measure_attention_maps(
        subject.model,
        ModelInputs(subject, examples),
        settings,
        image_processor=subject.image_processor,
        checkpoint=label,
        images=[example.id for example in examples],
        source=source,
    )


def _label(checkpoint: str) -> str:
    return Path(checkpoint).name


def _recorded(context: Context) -> dict[str, Any]:
    return dataclasses.asdict(_settings(context))


def _command(context: Context) -> str:
    count = str(_settings(context).max_samples)
    data = ["--data", context.data] if context.data else []
    return context.command("attention-maps", *data, "--samples", count, data=False)


SECTION = Section(
    "attention_maps",
    "Attention maps",
    "Where does a shallow block of the vision tower look? Attention of the CLS token to the patches, mean over heads, "
    "from dark (least in the image) to bright (most). With the base beside it where the tower was trained.",
    _run,
    _recorded,
    _command,
)
