"""What a measurement looks at: a checkpoint, its base and the data; models are loaded when something asks for them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llava_patch.data.examples import Example, read_examples

if TYPE_CHECKING:
    from llava_patch.data.loaded import LoadedCheckpoint

Opener = Callable[[], tuple[Any, Iterable[dict[str, Any]]]]
"""Loads a model: (model, keyword arguments of its forward for each sample)."""


@dataclass(eq=False)
class Target:
    """A checkpoint that is measured."""

    checkpoint: str  # folder or hub name, with the patch that it carries or that gin asks for
    data: str = ""  # see `read_examples`; "": rendered pages
    below: str = ""  # the model under a LoRA or projector-only checkpoint of llava; "": none
    base: str = ""  # the model that the checkpoint is compared with; "": none
    device: str = ""  # as `load_subject` takes it
    dtype: str = ""  # of the models, as `load_subject` takes it
    question: str = ""  # asked about every image; "": the data's own
    name: str = ""  # what results call the checkpoint

    @cached_property
    def subject(self) -> "LoadedCheckpoint":
        """The checkpoint's model; loaded once."""
        from llava_patch.data.loaded import load_subject

        return load_subject(self.checkpoint, self.below, self.device, self.dtype)

    def load_base(self) -> "LoadedCheckpoint":
        """The base's model, as its checkpoint is: without the patch that gin asks for."""
        from llava_patch.data.loaded import load_base

        return load_base(self.base, self.device, self.dtype)

    def release(self) -> None:
        """Let go of the checkpoint's model; what asks next loads it again."""
        del self.subject

    def examples(self, count: int | None, answers: bool = False) -> list[Example]:
        """At most `count` examples (None: all) at the size of the vision tower; `answers`: these must be known."""
        return examples_for(self.subject, self.data, count, self.question, answers)

    def samples(self, count: int | None, answers: bool = False) -> "ModelInputs":
        """Keyword arguments of the model's forward for the `examples`, made one at a time."""
        return self.subject.samples(self.data, count, self.question, answers)

    def openers(self, count: int | None) -> tuple[Opener, Opener]:
        """Two calls that load the checkpoint and the base: (model, samples of the same examples).

        Neither model stays here, so that what compares them may have one in memory at a time.
        """

        def opened(own: bool) -> "tuple[Any, ModelInputs]":
            subject = self.subject if own else self.load_base()
            if own:
                self.release()
            return subject.model, subject.samples(self.data, count, self.question)

        return lambda: opened(own=True), lambda: opened(own=False)


def examples_for(
    subject: "LoadedCheckpoint", data: str, count: int | None, question: str = "", answers: bool = False
) -> list[Example]:
    """Examples at the size of the model's vision tower, spread over the data; see `read_examples`."""
    from llava_patch.hosts.anatomy import find

    anatomy = find(subject.model)
    return read_examples(data, count, anatomy.grid[0] * anatomy.patch_size, question, answers)


class ModelInputs(Sequence):
    """Keyword arguments of a model's forward for some examples, made when they are asked for; a slice makes nothing.

    With `labels` where answers are asked for.
    """

    def __init__(self, subject: "LoadedCheckpoint", examples: list[Example], answers: bool = False) -> None:
        self.subject, self.examples, self.answers = subject, examples, answers

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Any]:
        # Sequence's own would take an IndexError of an image processor for the end.
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return ModelInputs(self.subject, self.examples[index], self.answers)
        inputs, example = self.subject.inputs(), self.examples[index]
        return inputs.of(example, self.answers)
