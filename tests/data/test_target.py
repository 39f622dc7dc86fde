"""Inputs that are made when they are asked for."""

from types import SimpleNamespace
from typing import Any

import pytest

from llava_patch.data.target import ModelInputs


class Question:
    def __init__(self, question: str) -> None:
        self.question = question


def test_an_index_error_while_inputs_are_made_does_not_end_the_data() -> None:
    def made(example: Question, answers: bool) -> Any:
        return [example.question][example.question == "broken"]

    subject: Any = SimpleNamespace(inputs=lambda: SimpleNamespace(of=made))
    inputs = ModelInputs(subject, [Question(q) for q in ("first", "broken", "last")])  # type: ignore[list-item]
    assert list(inputs[::2]) == ["first", "last"]
    with pytest.raises(IndexError):
        list(inputs)
