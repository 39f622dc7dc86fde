"""`llava-patch rprobe store`: what the stores of frozen tokens take on disk, and their removal."""

from __future__ import annotations

import typer

from llava_patch.probe.commands import app


@app.command("store")
def store_command(clear: bool = typer.Option(False, "--clear", help="delete every store that no process uses")) -> None:
    """List the frozen visual tokens kept on disk; --clear deletes them.

    They lie under $LLAVA_PATCH_CACHE/rprobe (default: llava_patch in the
    user's cache folder), at most RProbe.store_gb together: the longest unused
    ones are deleted first. Without them a probe encodes its images again.
    """
    import time

    from rich.console import Console
    from rich.table import Table

    from llava_patch.probe.store.disk import MB, delete_unused, list_stores, stores_folder

    console = Console()
    if clear:
        deleted, left = delete_unused(stores_folder())
        console.print(f"deleted {len(deleted)} stores, {sum(kept.bytes for kept in deleted) / MB:,.1f} MB")
        for kept in left:
            console.print(f"left, because a process uses it: {kept.folder}")
        return
    stores = list_stores(stores_folder())
    if not stores:
        console.print(f"no stores under {stores_folder()}")
        return
    size = sum(kept.bytes for kept in stores) / MB
    table = Table(title=f"{stores_folder()}: {size:,.1f} MB")
    for heading in ("store", "MB", "model", "data", "shards", "last use"):
        table.add_column(heading, overflow="fold")
    for kept in reversed(stores):
        about = kept.about
        there = len(list(kept.folder.glob("shard-*.safetensors")))
        table.add_row(
            kept.folder.name[:8],
            f"{kept.bytes / MB:,.1f}",
            str(about.get("model", "?")),
            str(about.get("data", "?")) + (", masked" if about.get("masked") else ""),
            f"{there} of {about.get('shards', '?')}",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(kept.used)),
        )
    console.print(table)
