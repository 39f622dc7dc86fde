"""Examples as what a loaded model takes: how many of them, at which size, as keyword arguments of its forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_patch.data.examples import Example
    from llava_patch.data.loaded import LoadedCheckpoint


def count_of(samples: int | None, bound: int | None, default: int) -> int | None:
    """How many samples: the option's number, else the setting's, else the command's own; None: all.

    Args:
        samples: of the command line; 0: all.
        bound: of the measurement's settings.
        default: the command's.
    """
    return (bound or default) if samples is None else (samples or None)


def with_count(settings: Any, samples: int | None, default: int) -> Any:
    """A measurement's settings with `max_samples` as `count_of` has it."""
    return dataclasses.replace(settings, max_samples=count_of(samples, settings.max_samples, default))


def examples_for(
    subject: "LoadedCheckpoint", data: str, count: int | None, question: str = "", answers: bool = False
) -> "list[Example]":
    """Examples at the size of the model's vision tower, spread over the data; see `read_examples`."""
    from llava_patch.data.examples import read_examples
    from llava_patch.hosts.anatomy import find

    anatomy = find(subject.model)
    return read_examples(data, count, anatomy.grid[0] * anatomy.patch_size, question, answers)


def samples_of(
    subject: "LoadedCheckpoint", examples: "list[Example]", answers: bool = False
) -> Iterator[dict[str, Any]]:
    """Keyword arguments of the model's forward, one example at a time; with `labels` where answers are asked for."""
    inputs = subject.inputs()
    for example in examples:
        image = example.open_image()
        if answers:
            yield inputs.training_inputs(image, example.question, example.answer)
        else:
            yield inputs.forward_inputs(image, example.question)


class ModelInputs:
    """The model's inputs of some examples, made one at a time; of known length, for the progress bar."""

    def __init__(self, subject: "LoadedCheckpoint", examples: "list[Example]") -> None:
        self.subject, self.examples = subject, examples

    def __len__(self) -> int:
        """How many examples."""
        return len(self.examples)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Keyword arguments of the model's forward."""
        return samples_of(self.subject, self.examples)
