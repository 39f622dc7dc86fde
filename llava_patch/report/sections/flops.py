"""What a forward pass costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from llava_patch import startup
from llava_patch.report.context import Context
from llava_patch.report.section import Found, Section, SkipSection, Table, found_of

TEXT = 64
BYTES = {"float32": 4}


def _run(context: Context, folder: Path) -> Found:
    from llava_patch.diagnostics.flops.count import Prompt
    from llava_patch.diagnostics.flops.files import read_shape
    from llava_patch.diagnostics.flops.result import default_split, measure_flops

    shape, routing, pruning = read_shape(context.below or context.checkpoint)
    asked = startup.configuration()
    if asked is not None:
        routing, pruning = asked.routing or routing, asked.pruning or pruning
    prompts = [Prompt(TEXT, shape.projected)]
    split = None
    if routing is None and shape.injections:  # DeepStack's taps come in below any split
        split = max(default_split(shape.decoder.layers), shape.injections[-1] + 1)
        if split > shape.decoder.layers - 2:
            raise SkipSection("DeepStack adds taps up to the last layers, so that no split is left to compare with")
    result = measure_flops(shape, prompts, split, own=(routing, pruning), value_bytes=BYTES.get(context.dtype, 2))
    alt = "FLOPs of every variant of this model's sizes."
    found = found_of(result, folder, "flops", alt)
    caption = f"{prompts[0].image} image and {TEXT} text tokens; FLOPs in closed form, saved against the stock model"
    return dataclasses.replace(found, tables=[Table(*result.table(), caption)])


def _settings(context: Context) -> dict[str, Any]:
    asked = startup.configuration()
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
