"""`llava-patch rprobe CKPT [DATA]`: one probe, or the four of the modality ablation."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import typer
from rich.console import Console

from llava_patch.cli import common, measure
from llava_patch.cli.common import check_results, facts_of, with_facts
from llava_patch.cli.rprobe import app
from llava_patch.core.errors import SettingError
from llava_patch.core.extras import need
from llava_patch.core.files import write_json, write_text
from llava_patch.core.terminal import bordered, counted
from llava_patch.core.undo import UndoStack
from llava_patch.measurements import asked as kept
from llava_patch.measurements.rprobe import ablation as four
from llava_patch.measurements.rprobe.measurement import RProbeMeasurement, read

if TYPE_CHECKING:
    from llava_patch.measurements.rprobe.result import RProbeResult

PROBE = RProbeMeasurement()
_FOUR = "image masked or full, text given or not: all four"
PARAMETERS: dict[str, tuple[Any, Any]] = {
    "checkpoint": (str, common.CHECKPOINT),
    "data": (str, common.DATA),
    "data_option": (str, common.DATA_OPTION),
    "output": (Optional[Path], common.output_option("rprobe")),
    "ablation": (bool, typer.Option(False, "--ablation", help=_FOUR)),
    **measure.options_of(PROBE),
    "overwrite": (bool, common.OVERWRITE),
    "formats": (list[str], common.FORMAT),
    "base": (str, common.BASE),
    "device": (str, common.DEVICE),
    "dtype": (str, common.DTYPE),
    "gin_file": (list[str], common.GIN_FILE),
    "gin_param": (list[str], common.GIN_PARAM),
}


def run_command(
    checkpoint: str, output: Path | None, ablation: bool, overwrite: bool, formats: list[str], **words: Any
) -> None:
    """See `RProbeMeasurement`, whose docstring is the help."""
    need("rprobe", *PROBE.extras)  # before torch, which takes seconds
    from llava_patch.core import parallel
    from llava_patch.core.locks import folder_lock
    from llava_patch.data.target import Target
    from llava_patch.measurements.rprobe.output import FIGURE, RESULT, write_run
    from llava_patch.settings import active
    from llava_patch.tools.sweep.process import signals_interrupt

    common.check_formats(formats)
    data = common.one_data(words.pop("data"), words.pop("data_option"))
    heldout, show = words.pop("heldout"), words.pop("show")
    base, device, dtype = (words.pop(name) for name in ("base", "device", "dtype"))
    gin, fields = (words.pop("gin_file"), words.pop("gin_param")), words
    if ablation and (fields["masked"] is not None or fields["text"] is not None):
        raise SettingError("--ablation runs masked and full images, with and without text: leave these options out")
    if heldout and not data:
        raise SettingError("--heldout: name the data to train on as well, as DATA")
    folder = common.folder_for("rprobe", checkpoint, output)

    def asked_of(settings: Any) -> dict[str, Any]:
        return kept.asked_of(PROBE, target, settings, {"heldout": heldout})

    def probe(settings: Any, folder: Path) -> "RProbeResult":
        with folder_lock(folder):
            found = PROBE.measure(target, settings, folder, sources, overwrite, heldout=heldout, show=show)
            result = found if found.kept else with_facts(found, checkpoint, asked_of(settings))
            write_run(result, folder, formats)
        if result.kept:
            _say(f"{folder / RESULT}: measured before")
        _say(result.summary())
        return result

    undo = UndoStack()
    # Warnings as one line each: where in our code they come from says nothing to who runs a command.
    undo.set_attribute(warnings, "formatwarning", lambda message, *args, **kwargs: f"warning: {message}\n")
    try:
        with undo, active.also(*gin), signals_interrupt(), parallel.processes(), parallel.guard():
            settings = active.settings_of(PROBE.settings, **fields)
            target = Target(checkpoint, data, base, "", device, dtype)
            asked = asked_of(settings)
            if not overwrite:
                check_folder(folder, checkpoint, asked, ablation)
            sources = read(data, settings), read(heldout, settings)
            for source, samples in zip((data, heldout), sources, strict=True):
                if samples is not None and samples.skipped:
                    count = counted(len(samples.skipped), "thing")
                    _say(f"{source}: {count} could not be used, such as {samples.skipped[0]}")
            if ablation:
                with common.results_in(folder):
                    _all_four(probe, settings, folder, checkpoint, asked)
            else:
                with common.results_in(folder):
                    result = probe(settings, folder)
                figure, maps = (folder / FIGURE).with_suffix(f".{formats[0]}"), counted(len(result.maps), "error map")
                if not result.kept:
                    _say(f"wrote {folder / RESULT}, and {figure} with {maps} beside it")
    except KeyboardInterrupt:
        if parallel.is_first():
            typer.echo("interrupted: the same command goes on from here", err=True)
        raise typer.Exit(130) from None


app.command("run", no_args_is_help=True)(measure._typed(run_command, PARAMETERS, PROBE.__doc__ or ""))


def check_folder(folder: Path, checkpoint: str, asked: dict[str, Any], ablation: bool) -> None:
    """Refuse a folder with R-Probe's results of another checkpoint, or under another patch of gin.

    Of those that would be replaced, refuse such of other settings or data, too (`asked`).
    """
    from llava_patch.measurements.rprobe.output import RESULT

    variants = {f"{name}/{RESULT}": {f"RProbe.{k}": v for k, v in own.items()} for name, own in four.VARIANTS.items()}
    for name, own in {RESULT: {}, four.SUMMARY: {}, **variants}.items():
        replaced = ablation == (name != RESULT)
        check_results(folder / name, [checkpoint], asked | own if replaced else None, kept.defaults_of(PROBE))


def _all_four(
    probe: "Callable[[Any, Path], RProbeResult]", settings: Any, folder: Path, checkpoint: str, asked: dict[str, Any]
) -> None:
    from llava_patch.core import parallel
    from llava_patch.measurements.rprobe.output import FIGURE, RESULT

    results = {}
    for number, (name, own) in enumerate(four.VARIANTS.items(), 1):
        _say(f"{number} of {len(four.VARIANTS)}: {name.replace('_', ' ')}")
        results[name] = probe(dataclasses.replace(settings, **own), folder / name)
    if parallel.rank() != 0:
        return
    summary = four.summarise(results, settings)
    facts = {key: results[name].facts[key] for key in ("base", "source", "heldout_source")}
    write_json(folder / four.SUMMARY, {**facts_of(checkpoint), **facts, kept.ASKED: asked, **summary})
    write_text(folder / "ablation.md", four.markdown_page(summary, f"R-Probe ablation of {checkpoint}"))
    for head, rows in four.tables(summary):
        Console().print(bordered(head, rows))
    for note in four.notes(summary):
        _say(note)
    _say(f"wrote {folder / 'ablation.json'}, {folder / 'ablation.md'} and, for each run, {RESULT} and {FIGURE}")


def _say(text: str) -> None:
    from llava_patch.core import parallel

    if parallel.rank() == 0:
        typer.echo(text)
