"""`llava-patch doctor [CKPT]`."""

from __future__ import annotations

import typer

from llava_patch.cli.common import GIN_FILE, GIN_PARAM


def doctor_command(
    checkpoint: str = typer.Argument("", metavar="CKPT", help="a checkpoint folder to look at as well"),
    gin_file: list[str] = GIN_FILE,
    gin_param: list[str] = GIN_PARAM,
    as_json: bool = typer.Option(False, "--json", help="the same for machines"),
) -> None:
    """Show versions, hosts, attention, what is patched and what is ignored, the machine.

    Gin options are read as a launch script's --gin_file and --gin_param would
    be. Exit code 1 when something cannot work.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from llava_patch.core.version import __version__
    from llava_patch.tools.doctor import PROBLEM
    from llava_patch.tools.doctor.examine import examine, summary, to_json

    with Console(stderr=True).status("looking, and trying what training and evaluation import"):
        rows = examine(checkpoint, gin_file, gin_param)
    if as_json:
        typer.echo(to_json(rows))
    else:
        table = Table("", title=f"llava_patch {__version__}")
        for name in ("what", "found", "advice"):
            table.add_column(name, overflow="fold")  # nothing is cut: names of classes and paths are long
        marks = {"ok": "", "note": "[yellow]note[/]", "problem": "[bold red]problem[/]"}
        for row in rows:
            table.add_row(marks[row.state], *map(escape, (row.what, row.found, row.advice)))
        console = Console()
        console.print(table)
        console.print(summary(rows))
    raise typer.Exit(1 if any(row.state == PROBLEM for row in rows) else 0)
