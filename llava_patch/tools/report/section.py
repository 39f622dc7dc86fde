"""One section of a report: how it is made, what is kept of it, and what sections share.

Models are loaded when the first section asks for them.
"""

import contextlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llava_patch.core.errors import InputError, LlavaPatchError
from llava_patch.core.weights import folder_of
from llava_patch.data.examples import Example
from llava_patch.data.loaded import base_of, pick_device
from llava_patch.data.target import Target
from llava_patch.measurements import base as protocol
from llava_patch.tools.inspect import Inspection, inspect_checkpoint
from llava_patch.tools.report.settings import Report

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


@dataclass(eq=False)
class Context(Target):
    """One checkpoint that a report is about.

    Its data type is float32 on CPU, and bfloat16 on a GPU that has it, unless another one is asked for.
    """

    rprobe: str = ""  # folder of R-Probe results; "": none
    run: str = ""  # folder of the training run; "": none
    settings: Report = field(default_factory=Report)  # sample counts
    gin: Sequence[str] = ()  # gin options of the command line, which commands that repeat a section need as well

    def __post_init__(self) -> None:
        if not self.dtype and pick_device(self.device) != "cpu" and torch.cuda.is_bf16_supported():
            self.dtype = "bfloat16"  # whose gradients do not vanish as float16's do
        self.folder = folder_of(self.checkpoint, download=True)  # where the checkpoint's files are
        base = self.base and folder_of(self.base, download=True, setting="--base")
        self.inspection: Inspection = inspect_checkpoint(self.folder, base)
        recorded = self.inspection.base
        if not self.base and recorded and Path(recorded).is_dir():
            with contextlib.suppress(LlavaPatchError):  # no LLaVA: a run that began with a plain LLM names that
                self.base = inspect_checkpoint(recorded).checkpoint
        self.below = self.base if self.inspection.form in ("lora", "projector") else ""
        self.run = self.run or (self.folder if (Path(self.folder) / "trainer_state.json").is_file() else "")

    def why_no_base(self) -> str | None:
        """Why there is nothing to compare with; None where there is."""
        if not self.base:
            return "no base to compare with: give the model it was trained from as --base"
        try:
            base_of(self.checkpoint, self.base, "--base")
        except LlavaPatchError as error:
            return f"the base is no LLaVA: {error}"
        return None

    def examples(self, count: int | None, answers: bool = False) -> list[Example]:
        """Examples spread evenly over the data."""
        try:
            return super().examples(count, answers)
        except InputError as error:
            if not answers:
                raise
            raise protocol.NothingToMeasure(str(error)) from error

    def command(self, *words: str, base: bool = False, data: bool = True) -> str:
        """A command line of ours about this checkpoint."""
        data_word = [self.data] if data and self.data else []
        parts = ["llava-patch", *words[0].split(), self.checkpoint, *data_word, *words[1:]]
        below = self.base if base else self.below
        parts += ["--base", below] if below else []
        parts += ["--question", self.question] if self.question and data else []
        parts += ["--device", self.device] if self.device else []
        parts += ["--dtype", self.dtype] if self.dtype else []
        return shlex.join([*parts, *self.gin])


@dataclass(frozen=True)
class Section:
    """How a section is made."""

    name: str  # in `--only`, `--skip` and file names
    title: str  # its heading
    about: str  # what is measured, and how to read it
    # measures, writes files into a folder, raises `NothingToMeasure` where there is nothing to measure
    run: Callable[[Context, Path], Found]
    # JSON values that the result depends on, beside checkpoint, base and data
    settings: Callable[[Context], dict[str, Any]] = lambda context: {}
    # the command that repeats it alone; "" where the report is the only way
    command: Callable[[Context], str] = lambda context: ""
    # why it cannot be made, found out before anything is loaded; None: it can
    why_not: Callable[[Context], str | None] = lambda context: None
    inputs: Callable[[Context], list[str]] = lambda context: []  # further files or folders that the result depends on
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


def found_of(
    result: protocol.Result, folder: Path, name: str, alt: str, tables: Sequence[tuple[str, protocol.Table]]
) -> Found:
    """What a measurement's result gives a section: it is saved, and its summary, figure and tables are shown."""
    paths, summary = result.save(folder, name), result.summary()
    figures = [Figure(path.name, f"{alt} {summary}") for path in paths if path.suffix == ".png"]
    shown = [Table(*table, caption) for caption, table in tables]
    return Found(summary, figures, shown, [path.name for path in paths])
