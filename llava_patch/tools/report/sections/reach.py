"""Gradient reach."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_patch.data.model_inputs import ModelInputs
from llava_patch.measurements.reach.measure import measure_reach
from llava_patch.measurements.reach.settings import Reach
from llava_patch.settings.active import settings_of
from llava_patch.tools.report.context import Context
from llava_patch.tools.report.section import Found, Section, found_of


def _run(context: Context, folder: Path) -> Found:
    settings = settings_of(Reach)
    examples = context.examples(settings.samples, answers=True)
    samples = ModelInputs(context.subject, examples, answers=True)
    result = measure_reach(context.subject.model, samples, settings)
    alt = "Norm of the gradient that reaches each part of the model, and the side branch's output layer by layer."
    return found_of(result, folder, "reach", alt)


def _recorded(context: Context) -> dict[str, Any]:
    return asdict(settings_of(Reach))


def _command(context: Context) -> str:
    return context.command("reach", "--samples", str(settings_of(Reach).samples))


SECTION = Section(
    "reach",
    "Gradient reach",
    "Which parameters does a training step give a gradient under this patch, and through which layers does the side "
    "branch get its own? Flags are as the checkpoint's settings set them.",
    _run,
    _recorded,
    _command,
)
