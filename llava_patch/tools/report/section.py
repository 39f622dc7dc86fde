"""One section of a report: how it is made, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_patch.measurements.base import Result
    from llava_patch.measurements.base import Table as Rows
    from llava_patch.tools.report.context import Context

DONE, SKIPPED, FAILED = "done", "skipped", "failed"


@dataclass(frozen=True)
class Figure:
    """A picture."""

    file: str  # its name in the report's folder
    alt: str  # what it shows, in words


@dataclass(frozen=True)
class Table:
    """A table of text."""

    head: list[str]  # column titles
    rows: list[list[str]]
    caption: str = ""
    folded: bool = False  # shown on demand only


@dataclass(frozen=True)
class Found:
    """What a section measured."""

    summary: str  # the finding, in a sentence or two
    figures: list[Figure] = field(default_factory=list)  # pictures, in order
    tables: list[Table] = field(default_factory=list)  # tables, in order
    files: list[str] = field(default_factory=list)  # names of the results' files in the report's folder


@dataclass(frozen=True)
class Section:
    """How a section is made."""

    name: str  # in `--only`, `--skip` and file names
    title: str  # its heading
    about: str  # what is measured, and how to read it
    # measures, writes files into a folder, raises `NothingToMeasure` where there is nothing to measure
    run: "Callable[[Context, Path], Found]"
    # JSON values that the result depends on, beside checkpoint, base and data
    settings: "Callable[[Context], dict[str, Any]]" = lambda context: {}
    # the command that repeats it alone; "" where the report is the only way
    command: "Callable[[Context], str]" = lambda context: ""
    # why it cannot be made, found out before anything is loaded; None: it can
    why_not: "Callable[[Context], str | None]" = lambda context: None
    inputs: "Callable[[Context], list[str]]" = lambda context: []  # further files or folders that the result depends on
    # whether the command makes what a skipped section lacks; otherwise it would end as the section did
    supplies: bool = False


@dataclass(frozen=True)
class Record:
    """What is kept of a section."""

    name: str
    title: str
    about: str
    state: str  # "done", "skipped" or "failed"
    reason: str = ""  # why it was skipped, or how it failed
    trace: str = ""  # of a failure
    found: Found | None = None  # what was measured; None when it was skipped or failed
    settings: dict[str, Any] = field(default_factory=dict)  # what it was measured with
    command: str = ""  # repeats it alone; "" where it was skipped and that cannot work either
    key: str = ""  # changes when checkpoint, base, data, settings or version do
    seconds: float = 0.0


def found_of(result: "Result", folder: Path, name: str, alt: str, tables: "Sequence[tuple[str, Rows]]") -> Found:
    """What a measurement's result gives a section: it is saved, and its summary, figure and tables are shown."""
    paths, summary = result.save(folder, name), result.summary()
    figures = [Figure(path.name, f"{alt} {summary}") for path in paths if path.suffix == ".png"]
    shown = [Table(*table, caption) for caption, table in tables]
    return Found(summary, figures, shown, [path.name for path in paths])
