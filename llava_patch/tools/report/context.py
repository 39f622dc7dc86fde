"""What sections share: the checkpoint, its base, the data, and models that are loaded when the first one asks."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llava_patch.core.errors import InputError, LlavaPatchError
from llava_patch.core.weights import folder_of
from llava_patch.data.loaded import base_of
from llava_patch.data.target import Target
from llava_patch.measurements.base import NothingToMeasure
from llava_patch.tools.inspect import Inspection, inspect_checkpoint
from llava_patch.tools.report.settings import Report

if TYPE_CHECKING:
    from llava_patch.data.examples import Example


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
        self.dtype = self.dtype or _dtype(self.device)
        self.folder = folder_of(self.checkpoint, download=True)  # where the checkpoint's files are
        base = self.base and folder_of(self.base, download=True, setting="--base")
        self.inspection: Inspection = inspect_checkpoint(self.folder, base)
        self.base = self.base or self._recorded_base()
        self.below = self.base if self.inspection.form in ("lora", "projector") else ""
        self.run = self.run or (self.folder if (Path(self.folder) / "trainer_state.json").is_file() else "")

    def _recorded_base(self) -> str:
        """An adapter's base, where it is a LLaVA that is there (a run that began with a plain LLM names that)."""
        recorded = self.inspection.base
        if not recorded or not Path(recorded).is_dir():
            return ""
        try:
            inspect_checkpoint(recorded)
        except LlavaPatchError:
            return ""
        return recorded

    def why_no_base(self) -> str | None:
        """Why there is nothing to compare with; None where there is."""
        if not self.base:
            return "no base to compare with: give the model it was trained from as --base"
        try:
            base_of(self.checkpoint, self.base, "--base")
        except LlavaPatchError as error:
            return f"the base is no LLaVA: {error}"
        return None

    def examples(self, count: int | None, answers: bool = False) -> "list[Example]":
        """Examples spread evenly over the data."""
        try:
            return super().examples(count, answers)
        except InputError as error:
            if not answers:
                raise
            raise NothingToMeasure(str(error)) from error

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


def _dtype(device: str) -> str:
    """Of the models where none is asked for: on a GPU bfloat16, whose gradients do not vanish as float16's do."""
    import torch

    from llava_patch.data.loaded import pick_device

    if pick_device(device) == "cpu":
        return ""
    return "bfloat16" if torch.cuda.is_bf16_supported() else ""
