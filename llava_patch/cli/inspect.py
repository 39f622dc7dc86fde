"""`llava-patch inspect CKPT`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from llava_patch.tools.inspect.result import Added, Inspection

ROWS = 24


def inspect_command(
    checkpoint: str = typer.Argument(
        ..., metavar="CKPT", help="a checkpoint folder of any form, or a hub model on this machine"
    ),
    base: str = typer.Option("", help="folder of the model below, to compare with; default: what an adapter names"),
    as_json: bool = typer.Option(False, "--json", help="everything as JSON, all tensors included"),
) -> None:
    """Show what a checkpoint is: host, form, settings, added tensors, base, what trains.

    Reads configuration and headers; no weights are loaded. Exit code 1 for a
    folder that is no checkpoint, or whose base is another one.
    """
    from llava_patch.tools.inspect import inspect_checkpoint
    from llava_patch.tools.inspect.result import to_json

    found = inspect_checkpoint(checkpoint, base)
    if as_json:
        typer.echo(to_json(found))
    else:
        show(found)
    raise typer.Exit(1 if found.match is not None and found.match.same is False else 0)


def show(found: "Inspection") -> None:
    """Print an inspection."""
    from rich.console import Console
    from rich.table import Table

    from llava_patch.tools.inspect.result import facts_of

    console = Console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(no_wrap=True, style="bold")
    facts.add_column(overflow="fold")
    for name, value in facts_of(found):
        facts.add_row(name, value)
    console.print(facts)
    for kind, values in found.settings.items():
        if values is None:
            continue
        table = Table("setting", "value", title=f"{kind}: {values['method']}", title_justify="left")
        for name, value in values.items():
            if name != "method":
                table.add_row(name, repr(value))
        console.print(table)
    if found.added:
        console.print(_tensors(found.added))


def _tensors(added: "list[Added]") -> "Table":
    from rich.table import Table

    table = Table(title=f"{len(added)} tensors of the patch", title_justify="left")
    table.add_column("tensor", overflow="fold")  # the ends of names tell them apart
    for name in ("shape", "dtype", "parameters", "part"):
        table.add_column(name, justify="right" if name == "parameters" else "left", no_wrap=True)
    for tensor in added[:ROWS]:
        shape = "x".join(map(str, tensor.shape))
        table.add_row(tensor.name, shape, tensor.dtype, f"{tensor.parameters:,}", tensor.role)
    rest = added[ROWS:]
    if rest:
        count = sum(tensor.parameters for tensor in rest)
        table.add_row(f"... and {len(rest)} more (--json)", "", "", f"{count:,}", "")
    return table
