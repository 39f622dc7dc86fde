"""What commands do with results: tables on the screen, and files that no other checkpoint's results replace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_patch.errors import CheckpointError
from llava_patch.files import write_json


def check_file(path: Path, checkpoint: str) -> None:
    """Refuse to replace the results of another checkpoint.

    Raises:
        CheckpointError: names the file, and what it was measured on.
    """
    from llava_patch.probe.commands.run import named

    try:
        other = json.loads(path.read_text(encoding="utf-8")).get("facts", {}).get("checkpoint")
    except (OSError, ValueError, AttributeError):  # none, or none that is worth keeping
        return
    if isinstance(other, str) and named(other) != named(checkpoint):
        raise CheckpointError(
            f"{path} holds the results of {other}, not of {named(checkpoint)}: give another folder with --output"
        )


def add_checkpoint(path: Path, checkpoint: str) -> None:
    """Note in a result's file what it was measured on."""
    facts = {"checkpoint": str(Path(checkpoint).resolve()) if Path(checkpoint).is_dir() else checkpoint}
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**values, "facts": facts})


def show(head: list[str], rows: list[list[str]], title: str | None = None) -> None:
    """A table on the screen: the first column is a name, the others are numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
