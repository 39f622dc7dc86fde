"""What commands over more than one checkpoint share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.cli import common as commands
from llava_patch.core.errors import CheckpointError
from llava_patch.data.model_inputs import ModelInputs, examples_for

if TYPE_CHECKING:
    from llava_patch.data.loaded import LoadedCheckpoint


def base_for(checkpoint: str, stock: str) -> str:
    """The base to compare a checkpoint with, by its argument or the checkpoint's record.

    Raises:
        CheckpointError: none is known, it is not there, or DATA stands in its place.
    """
    from llava_patch.data.base_model import base_of

    if stock:
        commands.check_checkpoint(stock, "BASE")
    if Path(stock.partition("?")[0]).is_file():
        raise CheckpointError(f'BASE {stock}: is a file; BASE stands before DATA ("" for the one that CKPT names)')
    return base_of(checkpoint, stock, "BASE")


Opener = Callable[[], "tuple[Any, ModelInputs]"]


def openers(
    checkpoint: str, stock: str, below: str, data: str, count: int | None, question: str, device: str, dtype: str
) -> tuple[Opener, Opener]:
    """What loads a checkpoint, and what loads the model it is compared with: (model, the samples made for it).

    Args:
        checkpoint: with the patch that it carries, or that gin asks for.
        stock: as it is.
        below: the model below a LoRA or projector-only checkpoint.
        data: see `read_examples`, and
        question: likewise.
        count: how many examples, spread evenly over the data; None: all.
        device: as `load_subject` takes it, and
        dtype: likewise.
    """
    from llava_patch.data.base_model import load_base

    def opened(subject: "LoadedCheckpoint") -> tuple[Any, ModelInputs]:
        return subject.model, ModelInputs(subject, examples_for(subject, data, count, question))

    return (
        lambda: opened(commands.load(checkpoint, below, device, dtype)),
        lambda: opened(load_base(stock, device, dtype)),
    )
