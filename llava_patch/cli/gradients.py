"""`llava-patch gradients`: gradient statistics of a checkpoint, a run's figure, and the table over runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from llava_patch.cli import common
from llava_patch.cli import output as written
from llava_patch.cli.common import (
    BASE,
    CHECKPOINT,
    DATA,
    DEVICE,
    GIN_FILE,
    GIN_PARAM,
    QUESTION,
    DefaultGroup,
    check_checkpoint,
    configured,
    folder_for,
)
from llava_patch.core.errors import SettingError
from llava_patch.core.extras import needs
from llava_patch.data.examples import check_data
from llava_patch.data.model_inputs import examples_for
from llava_patch.settings.active import settings_of


class _Group(DefaultGroup):
    """`gradients CKPT` is `gradients run CKPT`."""

    invoke = TyperGroup.invoke


HELP = """Gradients of a vision block: what comes through skip taps, and what does not.

llava-patch gradients CKPT [DATA] is short for gradients run: it measures a
fixed checkpoint. A training run is measured by a Gradients binding in its gin
configuration; show draws what it wrote, table compares several runs.
"""
app = typer.Typer(cls=_Group, no_args_is_help=True, help=HELP)


def add(parent: typer.Typer) -> None:
    """Add the group to the console command."""
    parent.add_typer(app, name="gradients")


@app.command("run", no_args_is_help=True)
@needs("gradients", "figures")
def run_command(
    checkpoint: str = CHECKPOINT,
    data: str = DATA,
    output: Path | None = typer.Option(  # noqa: B008
        None, help="folder for results; the same one again goes on; default: gradients/ and CKPT's name"
    ),
    steps: int = typer.Option(16, help="batches, each standing for a training step"),
    batch_size: int = typer.Option(4, help="examples a batch; the noise depends on it, so take the run's own"),
    block: int | None = typer.Option(None, help="block of the vision tower, from 1; default: the shallowest tapped"),
    full: str | None = typer.Option(None, help="run: taps as they are detached; attached: as if none were"),
    window: int | None = typer.Option(None, help="batches a window; default: Gradients.window, at most all"),
    smoothness: float | None = typer.Option(None, help="L of condition (7)"),
    step_size: float | None = typer.Option(None, help="its gamma: the learning rate that is asked about"),
    base: str = BASE,
    device: str = DEVICE,
    dtype: str = typer.Option("", help="float32, bfloat16 or float16; default: float32 on cpu, else bfloat16"),
    question: str = QUESTION,
    gin_file: list[str] = GIN_FILE,
    gin_param: list[str] = GIN_PARAM,
) -> None:
    """Measure the gradients of a fixed checkpoint; no weight moves.

    DATA needs answers: LLaVA's JSON or transcripts (default: rendered pages).
    A stock checkpoint has no skip taps: give it some, as in
    --gin-param "SkipLinks.stride = 2"; their weights are zero before they are
    trained, so that nothing passes them yet.

    OUTPUT gets gradients.json, gradients.png, and gradients.jsonl while it
    runs. Interrupted (Ctrl-C), the same command goes on. Finished results of the
    same checkpoint make way for those of other settings.
    """
    from llava_patch.data.loaded import pick_device
    from llava_patch.measurements.gradients.decompose import measured_block
    from llava_patch.measurements.gradients.measure import examples_digest, make_batches, measure_gradients
    from llava_patch.measurements.gradients.result import NAME
    from llava_patch.measurements.gradients.settings import Gradients

    for name, value, least in (("--steps", steps, 2), ("--batch-size", batch_size, 1)):
        if value < least:
            raise SettingError(f"{name} {value}: expected at least {least}")
    check_checkpoint(checkpoint)
    folder = folder_for("gradients", checkpoint, output)
    with configured(gin_file, gin_param, goes_on=True):
        written.check_results(folder / f"{NAME}.json", [checkpoint])
        settings = settings_of(
            Gradients, block=block, full=full, window=window, smoothness=smoothness, step_size=step_size
        )
        if not dtype and pick_device(device) != "cpu":
            dtype = "bfloat16"  # float16 gradients vanish without a loss scaler
        check_data(data)
        subject = common.load(checkpoint, base, device, dtype)
        measured_block(subject.model, settings.block, settings.full)  # before data are read
        examples = examples_for(subject, data, steps * batch_size, question, answers=True)
        batches = make_batches(subject.inputs(), examples, batch_size)
        if window is None:
            settings = dataclasses.replace(settings, window=min(settings.window, len(batches)))
        facts: dict[str, Any] = {**written.facts_of(checkpoint), "base": base, "data": data or "rendered pages"}
        facts["examples"] = examples_digest(examples[: len(batches) * batch_size])
        facts |= {"question": question, "dtype": str(next(subject.model.parameters()).dtype).removeprefix("torch.")}
        result = measure_gradients(subject.model, batches, settings, folder, facts)
    if len(batches) < steps:
        typer.echo(f"{len(examples)} examples make {len(batches)} batches of {batch_size}")
    _report(result, folder)


@app.command("show", no_args_is_help=True)
@needs("gradients show", "figures")
def show_command(
    run: Path = typer.Argument(..., metavar="RUN", help="folder of a run that was measured, finished or not"),  # noqa: B008
    output: Path | None = typer.Option(None, help="folder for results; default: RUN itself"),  # noqa: B008
    smoothness: float | None = typer.Option(None, help="L of condition (7); default: the run's setting"),
    step_size: float | None = typer.Option(None, help="its gamma; default: the run's setting or learning rate"),
    transition_windows: int | None = typer.Option(None, help="windows that t_trans must last; default: the run's"),
) -> None:
    """Draw and sum up what a training run has measured so far.

    Writes gradients.json and gradients.png from the run's gradients.jsonl.
    What is asked about condition (7) and t_trans may be changed afterwards.
    """
    from llava_patch.measurements.gradients.result import GradientsResult

    inside = run / "gradients"  # a training run's own folder does as well
    run = inside if inside.is_dir() else run
    result = GradientsResult.read(run)
    asked: dict[str, Any] = {"smoothness": smoothness, "step_size": step_size, "transition_windows": transition_windows}
    given = {name: value for name, value in asked.items() if value is not None}
    result = dataclasses.replace(result, settings=dataclasses.replace(result.settings, **given))
    _report(result, folder_for("gradients", str(run), run if output is None else output))


@app.command("table", no_args_is_help=True)
def table_command(
    runs: list[Path] = typer.Argument(..., metavar="RUN...", help="folders of measured runs, or of a sweep of them"),  # noqa: B008
    form: str = typer.Option("text", "--format", help="text, markdown or json"),
    figure: Path | None = typer.Option(None, help="also draw the runs over one another into this file"),  # noqa: B008
) -> None:
    """Compare runs: learning rate, t_trans, median cosine, median delta.

    This is the paper's Table 3; t_trans is "/" where the skip gradient did not
    settle below the main one, "-" where too few steps were measured to tell.
    """
    from llava_patch.measurements.gradients.compare import ordered, run_folders, runs_dict, runs_table
    from llava_patch.measurements.gradients.figure import runs_figure
    from llava_patch.measurements.gradients.result import GradientsResult

    if form not in ("text", "markdown", "json"):
        raise SettingError(f"--format {form}: expected text, markdown or json")
    results = {name: GradientsResult.read(folder) for name, folder in run_folders(runs).items()}
    head, rows = runs_table(results)
    if form == "json":
        typer.echo(json.dumps(runs_dict(results), indent=1))
    elif form == "markdown":
        typer.echo("\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)))
    else:
        written.show((head, rows))
    if figure is not None:
        typer.echo(f"wrote {runs_figure(ordered(results), figure)}", err=form == "json")


def _report(result: Any, folder: Path) -> None:
    written.show(result.table())
    typer.echo(result.summary())
    for path in result.save(folder):
        typer.echo(f"wrote {path}")
