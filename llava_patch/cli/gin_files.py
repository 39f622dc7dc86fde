"""`llava-patch gin-files [NAME]`."""

from __future__ import annotations

import typer


def gin_files(name: str = typer.Argument("", help="print this file, or list those with this in their name")) -> None:
    """List the shipped gin files, or print one."""
    from llava_patch.core.resources import gin_dir
    from llava_patch.settings.gin_config import find_file

    listed = [path for path in sorted(gin_dir().glob("*.gin")) if name in path.name]
    if name and (name.endswith(".gin") or not listed):
        typer.echo(find_file(name).read_text(encoding="utf-8"))
        return
    for path in listed:
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        typer.echo(f"{path.name:28} {first}")
