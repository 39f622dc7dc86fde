"""What a measurement looks at: a checkpoint, its base and the data; models are loaded when something asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_patch.data.examples import Example
    from llava_patch.data.loaded import LoadedCheckpoint
    from llava_patch.data.model_inputs import ModelInputs

Opener = Callable[[], tuple[Any, Iterable[dict[str, Any]]]]
"""Loads a model: (model, keyword arguments of its forward for each sample)."""


class Target:
    """A checkpoint that is measured.

    Attributes:
        checkpoint: folder or hub name, with the patch that it carries or that gin asks for.
        data: see `read_examples`; "": rendered pages.
        below: the model under a LoRA or projector-only checkpoint of llava; "": none.
        base: the model that the checkpoint is compared with; "": none.
        device: as `load_subject` takes it.
        dtype: of the models, as `load_subject` takes it.
        question: asked about every image; "": the data's own.
        name: what results call the checkpoint.
    """

    def __init__(
        self,
        checkpoint: str,
        data: str = "",
        below: str = "",
        base: str = "",
        device: str = "",
        dtype: str = "",
        question: str = "",
        name: str = "",
    ) -> None:
        self.checkpoint, self.data, self.below, self.base = checkpoint, data, below, base
        self.device, self.dtype, self.question, self.name = device, dtype, question, name

    @cached_property
    def subject(self) -> "LoadedCheckpoint":
        """The checkpoint's model; loaded once."""
        from llava_patch.data.loaded import load_subject

        return load_subject(self.checkpoint, self.below, self.device, self.dtype)

    def load_base(self) -> "LoadedCheckpoint":
        """The base's model, as its checkpoint is: without the patch that gin asks for."""
        from llava_patch.data.base_model import load_base

        return load_base(self.base, self.device, self.dtype)

    def release(self) -> None:
        """Let go of the checkpoint's model; what asks next loads it again."""
        del self.subject

    def examples(self, count: int | None, answers: bool = False) -> "list[Example]":
        """Examples at the size of the vision tower, spread evenly over the data.

        Args:
            count: how many at most; None: all.
            answers: whether the answer must be known.

        Raises:
            InputError: nothing usable there, or answers that are not known.
        """
        return self._examples(self.subject, count, answers)

    def _examples(self, subject: "LoadedCheckpoint", count: int | None, answers: bool = False) -> "list[Example]":
        from llava_patch.data.model_inputs import examples_for

        return examples_for(subject, self.data, count, self.question, answers)

    def samples(self, count: int | None, answers: bool = False) -> "ModelInputs":
        """Keyword arguments of the model's forward for the `examples`, made one at a time."""
        from llava_patch.data.model_inputs import ModelInputs

        return ModelInputs(self.subject, self.examples(count, answers), answers)

    def openers(self, count: int | None) -> tuple[Opener, Opener]:
        """Two calls that load the checkpoint and the base: (model, samples of the same examples).

        Neither model stays here, so that what compares them may have one in memory at a time.
        """
        from llava_patch.data.model_inputs import ModelInputs

        def opened(subject: "LoadedCheckpoint") -> "tuple[Any, ModelInputs]":
            return subject.model, ModelInputs(subject, self._examples(subject, count))

        def own() -> "tuple[Any, ModelInputs]":
            subject = self.subject
            self.release()
            return opened(subject)

        return own, lambda: opened(self.load_base())
