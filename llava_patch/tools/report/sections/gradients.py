"""Gradient statistics at this checkpoint, and those that its training run wrote."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.core.paths import named
from llava_patch.measurements.gradients.settings import Gradients
from llava_patch.settings import active
from llava_patch.settings.active import settings_of
from llava_patch.tools.report.context import Context
from llava_patch.tools.report.section import Found, Section, SkipSection, found_of

if TYPE_CHECKING:
    from llava_patch.data.examples import Example
    from llava_patch.data.inputs import Inputs

BATCH = 4
WINDOW = 16
"""Batches of one window, where `Gradients.window` is not bound: three windows from a report's 48."""


def _settings(context: Context) -> Gradients:
    asked = active.configuration()
    bound = asked is not None and "Gradients" in asked.measurements
    window = settings_of(Gradients).window if bound else WINDOW
    return settings_of(Gradients, window=max(2, min(window, context.settings.gradient_steps)))


def _recorded(context: Context) -> dict[str, Any]:
    batches = {"batches": context.settings.gradient_steps, "examples a batch": BATCH}
    return {**batches, **asdict(_settings(context))}


def _run(context: Context, folder: Path) -> Found:
    from llava_patch.measurements.gradients.measure import measure_gradients

    inputs = context.subject.inputs()
    examples = context.examples(context.settings.gradient_steps * BATCH, answers=True)
    if len(examples) < 2 * BATCH:
        raise SkipSection(f"{len(examples)} examples with answers, too few for two batches of {BATCH}")
    calls = [functools.partial(_inputs, inputs, example) for example in examples]
    batches = [calls[i : i + BATCH] for i in range(0, len(calls) - BATCH + 1, BATCH)]
    facts = {"checkpoint": named(context.checkpoint), "data": context.data or "rendered pages"}
    result = measure_gradients(context.subject.model, batches, _settings(context), None, facts)
    return found_of(
        result,
        folder,
        "gradients",
        "Four panels over the batches: squared norms of the skip and the main gradient, their variance in windows, "
        "their cosine, and their cross-covariance in windows.",
    )


def _inputs(inputs: "Inputs", example: "Example") -> dict[str, Any]:
    return inputs.training_inputs(example.open_image(), example.question, example.answer)


def _why_not(context: Context) -> str | None:
    asked = active.configuration()
    fusion = context.inspection.methods().get("fusion") or (None if asked is None else asked.fusion)
    if fusion is None or getattr(fusion, "layers", None) == ():  # SkipLinks(layers=()): a trained tower alone
        return "the model has no skip taps, so there is no skip gradient"
    return None


def _command(context: Context) -> str:
    steps = str(context.settings.gradient_steps)
    return context.command("gradients", "--steps", steps, "--window", str(_settings(context).window))


SECTION = Section(
    "gradients",
    "Gradients at this checkpoint",
    "What reaches a block of the vision tower through the skip taps, beside what comes through the main path, at the "
    "finished weights: no weight moves. Cosine below 0: the two pull apart. Delta: how far the two are from "
    "independent noise.",
    _run,
    _recorded,
    _command,
    _why_not,
)
