"""`llava-patch rprobe compare`."""

from __future__ import annotations

from pathlib import Path

import typer

from llava_patch.cli import common
from llava_patch.cli.rprobe import app
from llava_patch.core.errors import SettingError
from llava_patch.core.extras import needs
from llava_patch.measurements.base import words


@app.command("compare", no_args_is_help=True)
@needs("rprobe compare", "figures", "probe")
def compare_command(
    results: list[Path] = typer.Argument(  # noqa: B008
        ..., metavar="A B ...", help="result files, or folders that hold rprobe.json (lmms-eval's output too)"
    ),
    names: str = typer.Option("", help="what to call them, such as stock,detached; default: their folders"),
    baseline: str = typer.Option("", help="name of the one that the others are compared with; default: the first"),
    output: Path = typer.Option(Path("rprobe_compare"), help="folder for compare.md, .json and the figure"),  # noqa: B008
    formats: list[str] = common.FORMAT,
    resamples: int = typer.Option(2000, min=1, help="bootstrap resamples behind an interval"),
    seed: int = typer.Option(0, min=0, help="of the bootstrap"),
) -> None:
    """Compare R-Probe results: one table with intervals, all curves in one figure.

    Differences to the baseline are paired over held-out documents, where
    both results are of the same held-out samples. What differs between runs
    besides the model is listed under the table.
    """
    from rich.console import Console

    from llava_patch.core.terminal import show
    from llava_patch.measurements.rprobe.compare import compare_probes, load

    common.check_formats(formats)
    found = load(results, words(names))
    if len(found) < 2:
        raise SettingError(f"rprobe compare: one result ({', '.join(found)}), expected at least two")
    compared = compare_probes(found, baseline, resamples, seed)
    written = compared.save(output, formats=formats)
    errors, rest = compared.narrow()
    show(Console(), *errors, [], f"R-Probe results (base: {compared.baseline})")
    show(Console(), *rest, compared.notes, "in text, beside: MSE of the pixels there; last two: training steps until")
    for path in written:
        typer.echo(f"wrote {path}")
