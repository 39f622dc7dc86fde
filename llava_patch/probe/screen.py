"""A table with its footer on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def show(
    console: Console, head: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str], title: str
) -> None:
    """Print a table and its notes; names may hold brackets, which rich would take for markup."""
    # Few rules, so that the table fits a narrow terminal.
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(head):
        # Names are broken last, and numbers never.
        table.add_column(escape(name), overflow="fold", justify="left" if i == 0 else "right", no_wrap=i > 0)
    for line in lines:
        table.add_row(*(escape(cell) for cell in line))
    console.print(table)
    for note in notes:
        console.print(f"- {escape(note)}", highlight=False, soft_wrap=True)
