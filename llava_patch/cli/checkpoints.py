"""`llava-patch convert CKPT` and `llava-patch merge CKPT`: a checkpoint written in another form."""

from __future__ import annotations

from pathlib import Path

import typer

from llava_patch.core.errors import SettingError

_OUTPUT = typer.Option(..., "--output", metavar="OUTPUT", help="folder to write: a new one")
_OLD = typer.Argument("", hidden=True)
_TOWER = typer.Option("", "--vision-tower", help="the tower's folder: to hf, where it is; to llava, what to point at")


def convert_command(
    checkpoint: Path = typer.Argument(..., metavar="CKPT", help="a full checkpoint, stock or patched, or an adapter"),  # noqa: B008
    old: str = _OLD,
    output: Path = _OUTPUT,
    to: str = typer.Option(..., help="hf or llava"),
    vision_tower: str = _TOWER,
) -> None:
    """Write a checkpoint for the other host, with the patch that it carries."""
    from llava_patch.tools.convert.command import convert

    _refuse(old)
    typer.echo(f"wrote {convert(checkpoint, output, to, vision_tower or None)}")


def merge_command(
    checkpoint: Path = typer.Argument(..., metavar="CKPT", help="an adapter or a full patched checkpoint"),  # noqa: B008
    old: str = _OLD,
    output: Path = _OUTPUT,
    to: str = typer.Option("", help="hf or llava, to convert in the same go; default: the host that it is of"),
    vision_tower: str = _TOWER,
) -> None:
    """Write a plain checkpoint, which needs no llava_patch, where that is exact."""
    from llava_patch.tools.convert.command import merge

    _refuse(old)
    typer.echo(f"wrote {merge(checkpoint, output, to or None, vision_tower or None)}")


def _refuse(old: str) -> None:
    if old:
        raise SettingError(f"{old}: the folder to write is named with --output {old}")
