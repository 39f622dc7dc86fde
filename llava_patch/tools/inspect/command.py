"""`llava-patch inspect CKPT`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from llava_patch.tools.inspect.read import Added, Inspection

ROWS = 24


def add(app: typer.Typer) -> None:
    """Add the command."""
    app.command("inspect", no_args_is_help=True)(inspect_command)


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
    from llava_patch.tools.inspect.read import inspect_checkpoint, to_json

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

    from llava_patch.tools.inspect.read import FORMS

    console = Console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(no_wrap=True, style="bold")
    facts.add_column(overflow="fold")
    for name, value in facts_of(found, FORMS):
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
        console.print(_tensors(found.added, _table()))


def facts_of(found: "Inspection", forms: dict[str, str]) -> list[tuple[str, str]]:
    """The inspection's single facts, as text."""
    hosts = {"llava": "the original llava package", "hf": "Hugging Face's LlavaForConditionalGeneration", None: "?"}
    patch = [f"{kind}: {values['method']}" for kind, values in found.settings.items() if values]
    patch += ["vision tower: trained"] if found.trained_tower else []
    rows = [
        ("checkpoint", found.checkpoint),
        ("host", hosts[found.host]),
        ("form", forms[found.form]),
        ("patch", "; ".join(patch) or "none: a stock checkpoint"),
        ("weights", f"{found.parameters:,} parameters in its own files, {found.weight_bytes / 1e6:,.1f} MB"),
        ("trainable", share_text(found)),
    ]
    if found.base:
        rows.append(("base", found.base))
    if found.match is not None:
        rows.append(
            ("base matches", {True: "yes", False: "NO", None: "not known"}[found.match.same] + f": {found.match.note}")
        )
    if found.stage1:
        rows.append(("stage-1 files", "\n".join(found.stage1)))
    if found.versions:
        rows.append(("written by", ", ".join(f"{name} {value}" for name, value in found.versions.items())))
    if found.files:
        rows.append(("of its run", ", ".join(found.files)))
    return rows


def share_text(found: "Inspection") -> str:
    """The trainable share in words."""
    share = found.share
    if share.trainable is None:
        return share.note
    text = f"{share.trainable:,}"
    if share.total:
        text += f" of {share.total:,} parameters ({100 * share.trainable / share.total:.2f} %)"
    parts = ", ".join(f"{part} {count:,}" for part, count in share.by_part.items())
    return f"{text}: {parts or 'nothing'} ({share.note})"


def _table() -> Any:
    from rich.table import Table

    table = Table()
    table.add_column("tensor", overflow="fold")  # the ends of names tell them apart
    for name in ("shape", "dtype", "parameters", "part"):
        table.add_column(name, justify="right" if name == "parameters" else "left", no_wrap=True)
    return table


def _tensors(added: "list[Added]", table: Any) -> Any:
    shown = added[:ROWS]
    for tensor in shown:
        shape = "x".join(map(str, tensor.shape))
        table.add_row(tensor.name, shape, tensor.dtype, f"{tensor.parameters:,}", tensor.role)
    rest = added[ROWS:]
    if rest:
        count = sum(tensor.parameters for tensor in rest)
        table.add_row(f"... and {len(rest)} more (--json)", "", "", f"{count:,}", "")
    table.title, table.title_justify = f"{len(added)} tensors of the patch", "left"
    return table
