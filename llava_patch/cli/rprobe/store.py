"""`llava-patch rprobe store`: what the stores of frozen tokens take on disk, and their removal."""

from __future__ import annotations

import time

import typer
from rich.console import Console

from llava_patch.cli.rprobe import app
from llava_patch.core.terminal import counted


@app.command("store")
def store_command(clear: bool = typer.Option(False, "--clear", help="delete every store that no process uses")) -> None:
    """List the frozen visual tokens kept on disk; --clear deletes them.

    They lie under $LLAVA_PATCH_CACHE/rprobe (default: llava_patch in the
    user's cache folder), at most RProbe.store_gb together: the longest unused
    ones are deleted first. Without them a probe encodes its images again.
    """
    from llava_patch.measurements.rprobe.store.disk import delete_unused, list_stores, stores_folder

    console = Console()
    if clear:
        deleted, left = delete_unused(stores_folder())
        console.print(f"deleted {counted(len(deleted), 'store')}, {_size(sum(kept.bytes for kept in deleted))}")
        for kept in left:
            console.print(f"left, because a process uses it: {kept.folder}")
        return
    stores = list_stores(stores_folder())
    if not stores:
        console.print(f"no stores under {stores_folder()}")
        return
    total = _size(sum(kept.bytes for kept in stores))
    # A line a path: a table would break each of them over several.
    lines = [f"{stores_folder()}: {counted(len(stores), 'store')}, {total}"]
    for kept in reversed(stores):
        about = kept.about
        there = len(list(kept.folder.glob("shard-*.safetensors")))
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(kept.used))
        masked = ", masked" if about.get("masked") else ""
        lines += [
            f"{kept.folder.name[:8]}  {_size(kept.bytes)}, {there} of {about.get('shards', '?')} shards, used {used}",
            f"  model  {about.get('model', '?')}",
            f"  data   {about.get('data', '?')}{masked}",
        ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _size(number: int) -> str:
    """Bytes as text, in the unit that leaves at most three digits before the point."""
    from llava_patch.measurements.rprobe.store.disk import GB, MB

    for unit, scale in (("GB", GB), ("MB", MB)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number / 1e3:.1f} kB"
