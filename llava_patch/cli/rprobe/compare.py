"""`llava-patch rprobe compare`, and `llava-patch correlate`, also found as `llava-patch rprobe correlate`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import typer
from rich.console import Console

from llava_patch.cli import common
from llava_patch.cli.rprobe import app
from llava_patch.core import files
from llava_patch.core.errors import SettingError
from llava_patch.core.extras import needs
from llava_patch.core.outputs import place
from llava_patch.core.terminal import show
from llava_patch.measurements import asked as kept
from llava_patch.measurements.base import words


@app.command("compare", no_args_is_help=True)
@needs("rprobe compare", "figures", "probe")
def compare_command(
    results: list[Path] = typer.Argument(  # noqa: B008
        ..., metavar="A B ...", help="result files, or folders that hold rprobe.json (lmms-eval's output too)"
    ),
    names: str = typer.Option("", help="what to call them, such as stock,detached; default: their folders"),
    baseline: str = typer.Option("", help="name of the one that the others are compared with; default: the first"),
    output: Optional[Path] = common.output_option("rprobe-compare", "their names"),
    overwrite: bool = common.OVERWRITE,
    formats: list[str] = common.FORMAT,
    resamples: int = typer.Option(2000, min=1, help="bootstrap resamples behind an interval"),
    seed: int = typer.Option(0, min=0, help="of the bootstrap"),
) -> None:
    """Compare R-Probe results: one table with intervals, all curves in one figure.

    Differences to the baseline are paired over held-out documents, where
    both results are of the same held-out samples. What differs between runs
    besides the model is listed under the table.
    """
    from llava_patch.measurements.rprobe.compare import compare_probes, load

    common.check_formats(formats)
    common.check_paths(results)
    found = load(results, words(names))
    if len(found) < 2:
        raise SettingError(f"rprobe compare: one result ({', '.join(found)}), expected at least two")
    output = common.check_output(output or place("rprobe-compare", *found))
    with common.results_in(output):
        compared = compare_probes(found, baseline, resamples, seed)
        options = {"--names": [*found], "--baseline": compared.baseline, "--resamples": resamples, "--seed": seed}
        about = _about(output / "compare.json", results, options, overwrite)
        written = dataclasses.replace(compared, asked=about).save(output, formats=formats)
    errors, rest = compared.narrow()
    show(Console(), *errors, [], f"R-Probe results (base: {compared.baseline})")
    show(Console(), *rest, compared.notes, "in text, beside: MSE of the pixels there; last two: training steps until")
    for path in written:
        typer.echo(f"wrote {path}")


@app.command("correlate", no_args_is_help=True)
@needs("correlate", "figures", "probe")
def correlate(
    sources: list[str] = typer.Argument(  # noqa: B008
        ...,
        metavar="CHECKPOINT ...",
        help="RPROBE=RESULTS, a folder with rprobe.json and lmms-eval's results, or results that hold the rprobe task",
    ),
    probe: str = typer.Option("mse", help="mse, fvu, psnr, steps (to the threshold) or steps_half_fvu"),
    tasks: str = typer.Option("", help="such as ocrbench,textvqa_val or task/metric; default: what all have"),
    names: str = typer.Option("", help="what to call the checkpoints; default: lmms-eval's names of them"),
    output: Optional[Path] = common.output_option("correlate", "their names"),
    overwrite: bool = common.OVERWRITE,
    formats: list[str] = common.FORMAT,
    seed: int = typer.Option(0, min=0, help="of the permutations, where there are too many to count out"),
) -> None:
    """Rank correlation of checkpoints' probe results with benchmark scores.

    Scores come from lmms-eval's results JSON. The sign is turned so that
    above 0 a better probe goes with a better score.
    """
    from llava_patch.measurements.rprobe import correlate as correlation
    from llava_patch.measurements.rprobe.compare import markdown_page
    from llava_patch.measurements.rprobe.figures import draw_correlations, save

    common.check_formats(formats)
    if output is not None:
        common.check_output(output)
    common.check_paths([part for source in sources for part in source.split("=") if part or not source])
    checkpoints, notes = correlation.read_checkpoints(sources, words(names))
    output = common.check_output(output or place("correlate", *(one.name for one in checkpoints)))
    found, more = correlation.correlate(checkpoints, probe, words(tasks), seed)
    what, more_is_better = correlation.PROBES[probe]
    better = f"a better probe ({'higher' if more_is_better else 'lower'} {what}) goes with a better score"
    sign = f"above 0: {better}, whichever direction of the score is better"
    notes = [sign, *notes, *more, *correlation.footer(found)]
    head, lines = correlation.cells(found)
    title = f"Rank correlation with R-Probe's {what}"
    options = {"--probe": probe, "--tasks": words(tasks), "--names": words(names), "--seed": seed}
    with common.results_in(output):
        about = _about(output / "correlate.json", sources, options, overwrite)
        written = [files.write_text(output / "correlate.md", markdown_page(head, lines, notes, title))]
        record = {**about, "probe": probe, "correlations": [one.__dict__ for one in found], "notes": notes}
        written.append(files.write_json(output / "correlate.json", record))
        picture = draw_correlations(found, what)
        written += [save(picture, output / f"correlate.{suffix}") for suffix in formats]
    show(Console(), head, lines, notes, title)
    for path in written:
        typer.echo(f"wrote {path}")


def _about(path: Path, sources: Sequence[Any], options: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """What the file says of how it was made; one that was made in another way is refused."""
    where = kept.places(sources)
    if not overwrite:
        common.check_results(path, where, options)
    return {"sources": where, kept.ASKED: options}
