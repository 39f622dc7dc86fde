"""Tables: with their footer on the terminal, and in Markdown."""

import sys
from collections.abc import Sequence, Sized
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

GAP = 2  # columns between two cells: their padding and the rule that is not drawn
LOG_SECONDS = 15.0  # between two lines of a progress bar where nobody watches


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number of things, such as "1 store" and "2 stores"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def width_of(head: Sequence[str], lines: Sequence[Sequence[str]]) -> int:
    """Columns of the terminal that a table takes; a title of several lines is as wide as its longest."""
    widths = [
        max(len(line) for cell in column for line in cell.split("\n")) for column in zip(head, *lines, strict=True)
    ]
    return sum(widths) + GAP * len(widths)


def bordered(head: Sequence[str], lines: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """A table with rules around its cells, for `Console.print`; cells may hold rich's markup."""
    table = Table(*head, title=title, title_justify="left")
    for line in lines:
        table.add_row(*line)
    return table


def how_many(samples: Any, limit: int | None = None) -> str:
    """How many samples of a collection are taken, in words; "" where it does not know its length."""
    number = len(samples) if isinstance(samples, Sized) else limit
    return "" if number is None else counted(min(number, limit or number), "sample")


def say_cost(what: str, *parts: str, shown: bool = True) -> None:
    """Say on standard error what a long command is going to do, in counts: the bar that follows tells the time."""
    if shown:
        print(f"{what}: {', '.join(part for part in parts if part)}", file=sys.stderr, flush=True)


def progress_bar(total: int | None, label: str, shown: bool) -> Any:
    """A tqdm bar on standard error, rarely redrawn where that is no terminal; `total` None: not known."""
    from tqdm import tqdm

    watched = sys.stderr.isatty()
    interval = 0.5 if watched else LOG_SECONDS
    return tqdm(total=total, desc=label, disable=not shown, mininterval=interval, dynamic_ncols=watched)


def show(
    console: Console, head: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str], title: str
) -> None:
    """Print a table and its notes; names may hold brackets, which rich would take for markup.

    Nothing is broken: where the names of the first column leave no space for the rest, numbers stand for them and are
    explained above the table.
    """
    if lines and width_of(head, lines) > console.width:
        for i, line in enumerate(lines, 1):
            console.print(f"{i} = {escape(line[0])}", highlight=False, soft_wrap=True)
        lines = [[str(i), *line[1:]] for i, line in enumerate(lines, 1)]
    if title:
        console.print(escape(title), style="bold", highlight=False, soft_wrap=True)
    # Few rules, so that the table fits a narrow terminal.
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(head):
        table.add_column(escape(name), overflow="fold", justify="left" if i == 0 else "right", no_wrap=True)
    for line in lines:
        table.add_row(*(escape(cell) for cell in line))
    console.print(table)
    for note in notes:
        console.print(f"- {escape(note)}", highlight=False, soft_wrap=True)


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """A table in Markdown, without a line break at its end."""
    rule = ["---:" if numbers else "---"] * len(head)
    table = [[cell.replace("|", "\\|") for cell in line] for line in (head, rule, *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)
