"""`llava-patch report CKPT [DATA]`."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer

from llava_patch.cli.common import DATA, DEVICE, GIN_FILE, GIN_PARAM, QUESTION, configured, folder_for
from llava_patch.core.errors import CheckpointError, SettingError
from llava_patch.core.extras import needs
from llava_patch.data.examples import check_data
from llava_patch.settings.active import settings_of


@needs("report", "figures", "report")
def report_command(
    checkpoint: str = typer.Argument(
        "", metavar="CKPT", help="checkpoint folder or hub name, of llava or HF, patched or not"
    ),
    data: str = DATA,
    base: str = typer.Option("", help="the model it was trained from, for drift and fusion attention"),
    output: Optional[Path] = typer.Option(  # noqa: B008
        None,
        help="folder; the same one again keeps finished sections; default: report/ and CKPT's name",
        show_default=False,
    ),
    rprobe: str = typer.Option("", help="folder with R-Probe results of this checkpoint"),
    run: str = typer.Option("", help="folder of the training run; default: CKPT, where it has trainer_state.json"),
    only: list[str] = typer.Option([], help="make this section only; may be repeated"),  # noqa: B008
    skip: list[str] = typer.Option([], help="leave this section out; may be repeated"),  # noqa: B008
    fresh: bool = typer.Option(False, "--fresh", help="measure finished sections again"),
    source: str = typer.Option("", "--from", help="write the page of this report folder again; needs no model"),
    device: str = DEVICE,
    dtype: str = typer.Option("", help="of the models; default: float32 on cpu, bfloat16 on cuda"),
    question: str = QUESTION,
    gin_file: list[str] = GIN_FILE,
    gin_param: list[str] = GIN_PARAM,
) -> None:
    """Every measurement of a checkpoint in one HTML file that opens offline.

    OUTPUT gets report.html, and beside it each measurement's JSON and figure.
    A section that cannot be made says why; one that fails is shown as failed,
    the others stay, and the exit code is 1. Sample counts are settings of
    Report (--gin-param "Report.samples = 64").
    """
    from llava_patch.core.folder_lock import folder_lock
    from llava_patch.tools.report import build
    from llava_patch.tools.report.context import Context
    from llava_patch.tools.report.section import FAILED
    from llava_patch.tools.report.sections import sections
    from llava_patch.tools.report.settings import Report

    if source:
        if checkpoint:
            raise SettingError("--from writes the page of results that are there: leave CKPT out")
        kept = build.read(Path(source))
        if kept is None:
            raise CheckpointError(f"--from {source}: no {build.KEPT} there")
        typer.echo(f"wrote {build.write_page(kept, Path(source))}")
        return
    if not checkpoint:
        raise SettingError("name a checkpoint, or a report's folder with --from")
    with configured(gin_file, gin_param, goes_on=True):
        every = sections()
        chosen = build.choose(every, only, skip)
        for option, name in (("--rprobe", rprobe), ("--run", run)):
            if name and not Path(name).is_dir():
                raise CheckpointError(f"{option} {name}: no such folder")
        folder = folder_for("report", checkpoint, output)
        check_data(data)
        gin = [word for file in gin_file for word in ("--gin-file", file)]
        gin += [word for binding in gin_param for word in ("--gin-param", binding)]
        how = {"device": device, "dtype": dtype, "question": question}
        context = Context(
            checkpoint, data, base=base, **how, rprobe=rprobe, run=run, settings=settings_of(Report), gin=gin
        )
        with folder_lock(folder):
            values = build.build(context, every, chosen, folder, fresh, typer.echo)
            typer.echo(f"wrote {build.write_page(values, folder)}")
    failed = [record.name for record in values["sections"] if record.state == FAILED]
    if failed:
        typer.echo(f"failed: {', '.join(failed)}", err=True)
    raise typer.Exit(1 if failed else 0)
