"""What a forward pass costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from llava_patch.settings import active
from llava_patch.tools.report.context import Context
from llava_patch.tools.report.section import Found, Section, Table, found_of

TEXT = 64
BYTES = {"float32": 4}


def _run(context: Context, folder: Path) -> Found:
    from llava_patch.measurements.flops.count import Prompt
    from llava_patch.measurements.flops.files import read_shape
    from llava_patch.measurements.flops.result import measure_flops

    shape, routing, pruning = read_shape(context.below or context.checkpoint)
    asked = active.configuration()
    if asked is not None:
        routing, pruning = asked.routing or routing, asked.pruning or pruning
    prompts = [Prompt(TEXT, shape.projected)]
    result = measure_flops(shape, prompts, own=(routing, pruning), value_bytes=BYTES.get(context.dtype, 2))
    alt = "FLOPs of every variant of this model's sizes."
    found = found_of(result, folder, "flops", alt)
    caption = f"{prompts[0].image} image and {TEXT} text tokens; FLOPs in closed form, saved against the stock model"
    return dataclasses.replace(found, tables=[Table(*result.table(), caption)])


def _settings(context: Context) -> dict[str, Any]:
    asked = active.configuration()
    configured = {} if asked is None else {k: str(v) for k, v in asked.lasting().items()}
    return {"text tokens": TEXT, **configured}


SECTION = Section(
    "flops",
    "FLOPs",
    "What a forward pass costs in this model's sizes, stock and in every variant, in closed form: projections, "
    "attention over the whole sequence, feed-forward, head, vision tower and projector.",
    _run,
    _settings,
    lambda context: context.command("flops", data=False),
)
