"""`llava-patch reach`: which parameters a training step gives a gradient."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import typer

from llava_patch.cli import common as commands
from llava_patch.cli import output as written
from llava_patch.core.errors import SettingError
from llava_patch.core.extras import needs
from llava_patch.data.examples import check_data
from llava_patch.data.model_inputs import ModelInputs, count_of, examples_for
from llava_patch.settings.active import settings_of

SAMPLES = 4
_OUTPUT = typer.Option(None, help="folder of reach.json and reach.png; default: reach/NAME")


def add(app: typer.Typer) -> None:
    """Add the command."""
    app.command("reach")(reach)


@needs("reach", "figures")
def reach(
    checkpoint: str = commands.CHECKPOINT,
    data: str = commands.DATA,
    samples: int | None = commands.samples_option(SAMPLES, "Reach.samples"),
    everything: bool = typer.Option(False, "--all", help="as if every parameter trained, the vision tower included"),
    variants: str = typer.Option("", help="routings to compare on a checkpoint without one, such as lf,pc,kv,ideal"),
    split: int | None = typer.Option(None, min=0, help="with --variants: first routed layer; default: 18/32 of depth"),
    question: str = commands.QUESTION,
    base: str = commands.BASE,
    device: str = commands.DEVICE,
    dtype: str = commands.DTYPE,
    gin_file: list[str] = commands.GIN_FILE,
    gin_param: list[str] = commands.GIN_PARAM,
    output: Path | None = _OUTPUT,
) -> None:
    """Which parameters get a gradient, and how the side branch gets its own.

    One backward pass a sample, in training mode, with the checkpoint's patch
    or the one that gin bindings ask for. "none": no gradient arrives at
    something that trains; "exactly 0": only zeros do. Data need answers, or
    none are given (rendered pages).

    In full:

    llava-patch reach llava-v1.5-7b data.json --gin-param "Routing.split = 18"
    """
    from llava_patch.hosts.anatomy import find
    from llava_patch.measurements.flops.result import default_split
    from llava_patch.measurements.reach.compare import compare_reach
    from llava_patch.measurements.reach.measure import measure_reach
    from llava_patch.measurements.reach.settings import Reach
    from llava_patch.patching.handle import get_handle

    commands.check_checkpoint(checkpoint)
    names = [name.strip() for name in variants.split(",") if name.strip()]
    if split is not None and not names:
        raise SettingError(
            f'--split {split} belongs to --variants; one routing is --gin-param "Routing.split = {split}"'
        )
    with commands.configured(gin_file, gin_param):
        settings = settings_of(Reach, everything=everything or None)
        folder = commands.folder_for("reach", checkpoint, output)
        name = "reach_variants" if names else "reach"
        written.check_results(folder / f"{name}.json", [checkpoint])
        check_data(data)
        subject = commands.load(checkpoint, base, device, dtype)
        count = count_of(samples, settings.samples, SAMPLES)
        examples = examples_for(subject, data, count, question, answers=True)
        settings = dataclasses.replace(settings, samples=count or len(examples))
        result: Any
        if names:
            depth = len(find(subject.model).layers)
            result = compare_reach(
                subject.model,
                lambda: ModelInputs(subject, examples, answers=True),
                names,
                default_split(depth) if split is None else split,
                settings,
            )
        else:
            handle = get_handle(subject.model)
            if handle is not None:  # llava loads its tower after the patch and freezes it; a training run does this too
                handle.apply_freeze()
            result = measure_reach(subject.model, ModelInputs(subject, examples, answers=True), settings)
        written.show(result.table())
        written.finish_plain(result, folder, name, checkpoint)
