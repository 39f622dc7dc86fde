"""Examples as what a loaded model takes: how many of them, at which size, as keyword arguments of its forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_patch.data.examples import Example
    from llava_patch.data.inputs import Inputs
    from llava_patch.data.loaded import LoadedCheckpoint


def count_of(samples: int | None, bound: int | None, default: int) -> int | None:
    """How many samples: the option's number, else the setting's, else the command's own; None: all.

    Args:
        samples: of the command line; 0: all.
        bound: of the measurement's settings.
        default: the command's.
    """
    return (bound or default) if samples is None else (samples or None)


def examples_for(
    subject: "LoadedCheckpoint", data: str, count: int | None, question: str = "", answers: bool = False
) -> "list[Example]":
    """Examples at the size of the model's vision tower, spread over the data; see `read_examples`."""
    from llava_patch.data.examples import read_examples
    from llava_patch.hosts.anatomy import find

    anatomy = find(subject.model)
    return read_examples(data, count, anatomy.grid[0] * anatomy.patch_size, question, answers)


class ModelInputs(Sequence):
    """Keyword arguments of a model's forward for some examples, made when they are asked for; a slice makes nothing."""

    def __init__(self, subject: "LoadedCheckpoint", examples: "list[Example]", answers: bool = False) -> None:
        """The inputs of `examples`; with `labels` where answers are asked for."""
        self.subject, self.examples, self.answers = subject, examples, answers

    def __len__(self) -> int:
        """How many examples."""
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        """The inputs of one example, or the `ModelInputs` of a slice."""
        if isinstance(index, slice):
            return ModelInputs(self.subject, self.examples[index], self.answers)
        return self._make(self.subject.inputs(), self.examples[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The inputs of each example in turn."""
        inputs = self.subject.inputs()
        return (self._make(inputs, example) for example in self.examples)

    def _make(self, inputs: "Inputs", example: "Example") -> dict[str, Any]:
        image = example.open_image()
        if self.answers:
            return inputs.training_inputs(image, example.question, example.answer)
        return inputs.forward_inputs(image, example.question)
