"""`llava-patch rprobe CKPT [DATA]`: one probe, or the four of the modality ablation."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from llava_patch.cli.rprobe import app
from llava_patch.cli.rprobe.compare import check_formats
from llava_patch.core.errors import SettingError
from llava_patch.core.extras import needs
from llava_patch.core.paths import default_name
from llava_patch.measurements.rprobe.ablation import SUMMARY
from llava_patch.measurements.rprobe.settings import IMAGE_MODES, RProbe

if TYPE_CHECKING:
    from llava_patch.data.loaded import LoadedCheckpoint
    from llava_patch.measurements.rprobe.result import RProbeResult
    from llava_patch.probe.sample import Sample


@app.command("run", no_args_is_help=True)
@needs("rprobe", "figures", "probe")
def run_command(
    checkpoint: str = typer.Argument(
        ..., metavar="CKPT", help="checkpoint folder or hub name, of llava or HF, patched or not; or an adapter"
    ),
    data: str = typer.Argument(
        "", metavar="DATA", help="JSONL, SROIE/ICDAR, FUNSD, COCO-Text, TextOCR or HF data; default: rendered pages"
    ),
    heldout: str = typer.Option("", help="data to measure on, like DATA; default: a share of DATA's documents"),
    output: Path | None = typer.Option(  # noqa: B008
        None,
        help="folder for results; the same one again goes on; default: rprobe/ and CKPT's name (RUN__checkpoint-N)",
        show_default=False,
    ),
    ablation: bool = typer.Option(False, "--ablation", help="image masked or full, text given or not: all four"),
    base: str = typer.Option("", help="the model below a LoRA or projector-only checkpoint of llava"),
    device: str = typer.Option("", help="cpu, cuda or cuda:N; default: cuda where there is one"),
    dtype: str = typer.Option(
        "", help="of the model: float32, bfloat16, float16; default: float32 on cpu, else float16"
    ),
    masked: bool | None = typer.Option(None, "--masked/--full", help="black out the region before the tower sees it"),
    text: bool | None = typer.Option(None, "--text/--no-text", help="give the text, or the unknown token instead"),
    steps: int | None = typer.Option(None, help="optimiser steps"),
    batch_size: int | None = typer.Option(None, help="samples a step, over all processes"),
    minutes: float | None = typer.Option(None, help="end training after so many minutes; the result says so"),
    trained: str | None = typer.Option(None, help="all, lora or head; the last two need little memory"),
    seed: int | None = typer.Option(None, help="of pages, split, pixel head and order"),
    train_pages: int | None = typer.Option(None, help="rendered pages to train on"),
    heldout_pages: int | None = typer.Option(None, help="rendered pages to measure on"),
    boxes_per_sample: int | None = typer.Option(None, help="text regions that make one sample together"),
    image_mode: str | None = typer.Option(None, help=f"{', '.join(IMAGE_MODES[:-1])} or {IMAGE_MODES[-1]}"),
    broken: str | None = typer.Option(None, help="stop at a sample that cannot be used, or skip it"),
    show: list[str] = typer.Option([], help="id of a held-out sample to draw; may be repeated; default: spread"),  # noqa: B008
    formats: list[str] = typer.Option(["png"], "--format", help="of figures: png or pdf; may be repeated"),  # noqa: B008
    gin_file: list[str] = typer.Option([], help="gin file with RProbe bindings or a patch; may be repeated"),  # noqa: B008
    gin_param: list[str] = typer.Option([], help="one gin binding, RProbe.lr = 1e-3; may be repeated"),  # noqa: B008
) -> None:
    """Train a small decoder on a model's visual tokens; how well does it rebuild pixels?

    Every setting of RProbe can be bound with --gin-param; options of the
    command line win over bindings, and bindings over defaults.

    OUTPUT gets rprobe.json, rprobe.png, map-N.png and decoder.safetensors;
    with --ablation a folder with these for each of the four runs, and
    ablation.json and ablation.md. A folder with results of another checkpoint
    is refused: without --output, checkpoints of one folder name share one.

    Interrupted (Ctrl-C), the same command goes on from the last state, which
    is written every RProbe.save_every steps. With several GPUs:
    torchrun --nproc-per-node N -m llava_patch.cli.main rprobe CKPT ...
    """
    from llava_patch.core import parallel
    from llava_patch.settings import active
    from llava_patch.tools.sweep.process import signals_interrupt

    given = {
        "masked": masked, "text": text, "steps": steps, "batch_size": batch_size, "minutes": minutes,
        "trained": trained, "seed": seed, "train_pages": train_pages, "heldout_pages": heldout_pages,
        "boxes_per_sample": boxes_per_sample, "image_mode": image_mode, "broken": broken,
    }  # fmt: skip
    check_formats(formats)
    if ablation and (masked is not None or text is not None):
        raise SettingError("--ablation runs masked and full images, with and without text: leave these options out")
    if heldout and not data:
        raise SettingError("--heldout: name the data to train on as well, as DATA")
    folder = output if output is not None else Path("rprobe") / default_name(checkpoint)
    try:
        with active.also(gin_file, gin_param), signals_interrupt(), _short_warnings(), parallel.processes():
            settings = settings_of({name: value for name, value in given.items() if value is not None})
            with parallel.guard():
                _measure(checkpoint, data, heldout, folder, ablation, settings, base, device, dtype, show, formats)
    except KeyboardInterrupt:
        if parallel.is_first():
            typer.echo("interrupted: the same command goes on from here", err=True)
        raise typer.Exit(130) from None


def settings_of(given: dict[str, Any]) -> RProbe:
    """Settings from gin (environment, then options), with the command line's own on top."""
    from llava_patch.settings import active

    asked = active.configuration()
    bound = None if asked is None else asked.measurements.get("RProbe")
    return dataclasses.replace(RProbe() if bound is None else bound, **given)


def check_folder(folder: Path, checkpoint: str) -> None:
    """Refuse to replace R-Probe's results of another checkpoint, or of this one under another patch of gin.

    Args:
        folder: where results will be written.
        checkpoint: what they are measured on.

    Raises:
        CheckpointError: names the file, and what it was measured on.
    """
    from llava_patch.cli.output import check_results
    from llava_patch.measurements.rprobe.ablation import VARIANTS
    from llava_patch.measurements.rprobe.output import RESULT

    for name in (RESULT, SUMMARY, *(f"{name}/{RESULT}" for name in VARIANTS)):
        check_results(folder / name, [checkpoint])


def _measure(
    checkpoint: str,
    data: str,
    heldout: str,
    folder: Path,
    ablation: bool,
    settings: RProbe,
    base: str,
    device: str,
    dtype: str,
    show: list[str],
    formats: list[str],
) -> None:
    from llava_patch.cli.output import facts_of
    from llava_patch.core import parallel
    from llava_patch.core.files import atomic, write_json
    from llava_patch.core.folder_lock import folder_lock
    from llava_patch.core.terminal import counted
    from llava_patch.data.loaded import load_subject
    from llava_patch.data.readers.read import resolve_source
    from llava_patch.measurements.rprobe.ablation import VARIANTS, markdown, notes, summarise, tables, variant
    from llava_patch.measurements.rprobe.output import FIGURE, RESULT

    check_folder(folder, checkpoint)
    samples = _read(data, settings)
    measured = _read(heldout, settings)
    subject = load_subject(checkpoint, base, device, dtype)
    facts = {**facts_of(checkpoint), "base": base, "source": resolve_source(data)}
    facts["heldout_source"] = resolve_source(heldout)
    if not ablation:
        result = _probe(subject, settings, samples, measured, folder, facts, show, formats)
        _say(result.summary())
        figure = (folder / FIGURE).with_suffix(f".{formats[0]}")
        _say(f"wrote {folder / RESULT}, and {figure} with {counted(len(result.maps), 'error map')} beside it")
        return
    with folder_lock(folder):
        results = {}
        for number, name in enumerate(VARIANTS, 1):
            _say(f"{number} of {len(VARIANTS)}: {name.replace('_', ' ')}")
            results[name] = _probe(
                subject, variant(settings, name), samples, measured, folder / name, facts, show, formats
            )
            _say(results[name].summary())
        if parallel.rank() != 0:
            return
        summary = summarise(results, settings)
        write_json(folder / SUMMARY, {**facts, **summary})
        with atomic(folder / "ablation.md") as part:
            part.write_text(markdown(summary, f"R-Probe ablation of {checkpoint}"), encoding="utf-8")
        _show(tables(summary))
        for note in notes(summary):
            _say(note)
        _say(f"wrote {folder / 'ablation.json'}, {folder / 'ablation.md'} and, for each run, {RESULT} and {FIGURE}")


def _read(source: str, settings: RProbe) -> "list[Sample] | None":
    if not source:
        return None
    from llava_patch.core.terminal import counted
    from llava_patch.data.readers import read_samples

    samples = read_samples(source, settings.boxes_per_sample, settings.broken)
    if samples.skipped:
        count = counted(len(samples.skipped), "thing")
        _say(f"{source}: {count} could not be used, such as {samples.skipped[0]}")
    return samples


def _probe(
    subject: "LoadedCheckpoint",
    settings: RProbe,
    samples: "list[Sample] | None",
    heldout: "list[Sample] | None",
    folder: Path,
    facts: dict[str, Any],
    show: list[str],
    formats: list[str],
) -> "RProbeResult":
    from llava_patch.core.folder_lock import folder_lock
    from llava_patch.measurements.rprobe.fit import run_rprobe
    from llava_patch.measurements.rprobe.output import write_run

    with folder_lock(folder):
        result = run_rprobe(
            subject.model,
            subject.image_processor,
            subject.tokenizer,
            settings,
            samples,
            heldout,
            work=folder,
            show=show,
        )
        result.facts.update(facts)
        write_run(result, folder, formats)
    return result


def _say(text: str) -> None:
    from llava_patch.core import parallel

    if parallel.rank() == 0:
        typer.echo(text)


def _show(found: list[tuple[list[str], list[list[str]]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    for head, rows in found:
        table = Table(*head)
        for row in rows:
            table.add_row(*row)
        Console().print(table)


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings as one line each: where in our code they come from says nothing to who runs a command."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *args, **kwargs: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before
