"""What sections share: the checkpoint, its base, the data, and models that are loaded when the first one asks."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.core.errors import InputError, LlavaPatchError
from llava_patch.data.base_model import base_of, load_base
from llava_patch.data.loaded import load_subject
from llava_patch.data.model_inputs import ModelInputs, examples_for, with_count
from llava_patch.settings.active import settings_of
from llava_patch.tools.inspect import Inspection, inspect_checkpoint
from llava_patch.tools.inspect.place import folder_of
from llava_patch.tools.report.section import SkipSection
from llava_patch.tools.report.settings import Report

if TYPE_CHECKING:
    from llava_patch.data.examples import Example
    from llava_patch.data.loaded import LoadedCheckpoint

Opened = Callable[[], tuple[Any, ModelInputs]]


class Context:
    """One checkpoint that a report is about.

    Attributes:
        checkpoint: folder or hub name.
        folder: where its files are.
        data: as measurements take it; "": rendered pages.
        base: folder of the model below or before; "": none known.
        rprobe: folder of R-Probe results; "": none.
        run: folder of the training run; "": none.
        device: as `load_subject` takes it.
        dtype: likewise; "": float32 on CPU, bfloat16 on a GPU that has it.
        question: asked about every image; "": the data's own.
        settings: sample counts.
        gin: gin options of the command line, which commands that repeat a section need as well.
    """

    def __init__(
        self,
        checkpoint: str,
        data: str = "",
        base: str = "",
        rprobe: str = "",
        run: str = "",
        device: str = "",
        dtype: str = "",
        question: str = "",
        settings: Report | None = None,
        gin: Sequence[str] = (),
    ) -> None:
        self.checkpoint, self.data, self.rprobe = checkpoint, data, rprobe
        self.device, self.dtype = device, dtype or _dtype(device)
        self.question, self.settings, self.gin = question, settings or Report(), list(gin)
        self.folder = folder_of(checkpoint, download=True)
        self.inspection: Inspection = inspect_checkpoint(
            self.folder, base and folder_of(base, download=True, setting="--base")
        )
        self.base = base or self._recorded_base()
        self.run = run or (self.folder if (Path(self.folder) / "trainer_state.json").is_file() else "")

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

    @property
    def below(self) -> str:
        """What the loader needs under this checkpoint (LoRA and projector-only checkpoints of llava)."""
        return self.base if self.inspection.form in ("lora", "projector") else ""

    @cached_property
    def subject(self) -> "LoadedCheckpoint":
        """The checkpoint's model; loaded once."""
        return load_subject(self.checkpoint, self.below, self.device, self.dtype)

    def release(self) -> None:
        """Let go of the model; the next section that asks loads it again."""
        del self.subject

    def openers(self, count: int | None) -> "tuple[Opened, Opened]":
        """Two calls that load the checkpoint and the base with samples of the same examples.

        Neither model stays here: what compares them has one in memory at a time.
        """

        def own() -> "tuple[Any, ModelInputs]":
            subject = self.subject
            self.release()
            return subject.model, ModelInputs(subject, self._examples(subject, count))

        def other() -> "tuple[Any, ModelInputs]":
            subject = load_base(self.base, self.device, self.dtype)
            return subject.model, ModelInputs(subject, self._examples(subject, count))

        return own, other

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
        """Examples spread evenly over the data.

        Raises:
            SkipSection: answers are asked for, and the data have none.
        """
        if not answers:
            return self._examples(self.subject, count)
        try:
            return examples_for(self.subject, self.data, count, self.question, answers=True)
        except InputError as error:
            raise SkipSection(str(error)) from error

    def _examples(self, subject: "LoadedCheckpoint", count: int | None) -> "list[Example]":
        return examples_for(subject, self.data, count, self.question)

    def samples(self, count: int | None) -> ModelInputs:
        """Keyword arguments of the model's forward, for examples spread over the data."""
        return ModelInputs(self.subject, self._examples(self.subject, count))

    def counted(self, kind: Any, count: int) -> Any:
        """Settings of a measurement as gin binds them, with `count` samples where it does not say how many."""
        return with_count(settings_of(kind), None, count)

    def against_base(self, *words: str) -> str:
        """A command line that takes the base as its second argument."""
        parts = ["llava-patch", words[0], self.checkpoint, self.base or "BASE", *([self.data] if self.data else [])]
        parts += ["--question", self.question] if self.question else []
        return shlex.join([*parts, *words[1:], *self._options()])

    def _options(self) -> list[str]:
        parts = ["--device", self.device] if self.device else []
        return parts + (["--dtype", self.dtype] if self.dtype else []) + self.gin

    def command(self, *words: str, base: bool = False, data: bool = True) -> str:
        """A command line of ours about this checkpoint.

        Args:
            words: the subcommand and its options.
            base: whether it takes --base in any case.
            data: whether it takes the data.
        """
        data_word = [self.data] if data and self.data else []
        parts = ["llava-patch", *words[0].split(), self.checkpoint, *data_word, *words[1:]]
        below = self.base if base else self.below
        parts += ["--base", below] if below else []
        parts += ["--question", self.question] if self.question and data else []
        return shlex.join([*parts, *self._options()])


def _dtype(device: str) -> str:
    """Of the models where none is asked for: on a GPU bfloat16, whose gradients do not vanish as float16's do."""
    import torch

    from llava_patch.data.loaded import pick_device

    if pick_device(device) == "cpu":
        return ""
    return "bfloat16" if torch.cuda.is_bf16_supported() else ""
