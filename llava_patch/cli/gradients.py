"""`llava-patch gradients show` and `table`: what training runs have measured."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Optional

import typer

from llava_patch.cli import common
from llava_patch.core.errors import SettingError
from llava_patch.core.extras import needs
from llava_patch.core.files import plain
from llava_patch.core.outputs import place
from llava_patch.core.paths import default_name
from llava_patch.measurements import asked as kept


@needs("gradients show", "figures")
def show(
    run: Path = typer.Argument(..., metavar="RUN", help="folder of a run that was measured, finished or not"),  # noqa: B008
    output: Optional[Path] = common.output_option("gradients-show", "RUN's name"),
    smoothness: Optional[float] = typer.Option(None, help="L of condition (7); default: the run's setting"),
    step_size: Optional[float] = typer.Option(None, help="its gamma; default: the run's setting or learning rate"),
    transition_windows: Optional[int] = typer.Option(None, help="windows that t_trans must last; default: the run's"),
    overwrite: bool = common.OVERWRITE,
    formats: list[str] = common.FORMAT,
) -> None:
    """Draw and sum up what a training run has measured so far.

    Writes gradients.json and gradients.png from the run's gradients.jsonl.
    What is asked about condition (7) and t_trans may be changed afterwards.
    """
    from llava_patch.measurements.gradients.result import GradientsResult

    common.check_paths([run])
    common.check_formats(formats)
    named = default_name(str(run))
    inside = run / "gradients"  # a training run's own folder does as well
    run = inside if inside.is_dir() else run
    result = GradientsResult.read(run)
    asked: dict[str, Any] = {"smoothness": smoothness, "step_size": step_size, "transition_windows": transition_windows}
    given = {name: value for name, value in asked.items() if value is not None}
    result = dataclasses.replace(result, settings=dataclasses.replace(result.settings, **given))
    folder = common.check_output(place("gradients-show", named) if output is None else output)
    with common.results_in(folder):
        path = folder / GradientsResult.NAME
        before = kept.read_kept(path.with_suffix(".json")) if not overwrite else None
        if before is not None:  # of this run, and maybe asked about in another way
            there = {} if not isinstance(before.get("facts"), dict) else before["facts"]
            kept.check_asked({kept.ASKED: _run(there)}, str(path.with_suffix(".json")), _run(plain(result.facts)))
            if kept.ASKED in there:
                result = dataclasses.replace(result, facts={**result.facts, kept.ASKED: there[kept.ASKED]})
        common.show(result.table())
        typer.echo(result.summary())
        for path in result.save(folder, formats=formats):
            typer.echo(f"wrote {path}")


def _run(facts: dict[str, Any]) -> dict[str, Any]:
    """What tells one measured run from another."""
    return {name: value for name, value in facts.items() if name not in (kept.ASKED, common.CONFIGURED)}


def table(
    runs: list[Path] = typer.Argument(..., metavar="RUN...", help="folders of measured runs, or of a sweep of them"),  # noqa: B008
    form: str = typer.Option("text", "--as", help="text, markdown or json"),
    figure: Optional[Path] = typer.Option(None, help="also draw the runs over one another into this file"),  # noqa: B008
    old: str = typer.Option("", "--format", hidden=True),
) -> None:
    """Compare runs: learning rate, t_trans, median cosine, median delta.

    This is the paper's Table 3; t_trans is "/" where the skip gradient did not
    settle below the main one, "-" where too few steps were measured to tell.
    """
    from llava_patch.measurements.gradients.figure import runs_figure
    from llava_patch.measurements.gradients.result import GradientsResult, ordered, run_folders, runs_dict, runs_table

    if old:
        raise SettingError(f"--format {old}: is of figures in every command; a table is printed with --as {old}")
    common.check_paths(runs)
    if form not in ("text", "markdown", "json"):
        raise SettingError(f"--as {form}: expected text, markdown or json")
    results = {name: GradientsResult.read(folder) for name, folder in run_folders(runs).items()}
    head, rows = runs_table(results)
    if form == "json":
        typer.echo(json.dumps(runs_dict(results), indent=1))
    elif form == "markdown":
        typer.echo("\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)))
    else:
        common.show((head, rows))
    if figure is not None:
        typer.echo(f"wrote {runs_figure(ordered(results), figure)}", err=form == "json")
