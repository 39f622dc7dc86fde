"""The loss that a Trainer of transformers goes back through, without going back, and without a trace; its step's rate.

A Trainer's own `training_step` makes it, with its backward pass caught: so it is scaled for accumulation, precision and
ranks as that Trainer does it, whatever its version or subclass.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llava_patch.core.undo import UndoStack
from llava_patch.hosts import zero


def caught_loss(trainer: Any, step: Callable[..., Any], *arguments: Any) -> Tensor:
    """The loss of one micro-batch with its graph.

    Args:
        trainer: whose accelerator would run the backward pass.
        step: its `training_step`, as it was before anybody wrapped it for a measurement.
        arguments: the step's own; the model should be the bare one, so that no hook of DDP or DeepSpeed wakes up.

    Returns:
        The scalar that `.backward()` would be called on, without a gradient scaler's factor (see `loss_scale`).
    """
    caught: list[Tensor] = []
    undo = UndoStack()
    undo.set_attribute(trainer.accelerator, "backward", lambda loss, **kwargs: caught.append(loss))
    try:
        step(*arguments)
    finally:
        undo.unwind()
    loss = caught[0]
    # accelerate divides as well, by a number that Trainers leave at 1; with DeepSpeed it leaves that to the engine.
    return loss if trainer.is_deepspeed_enabled else loss / trainer.accelerator.gradient_accumulation_steps


def loss_scale(trainer: Any) -> float:
    """What float16 training multiplies its loss by in this step; 1.0 where it does not."""
    if trainer.is_deepspeed_enabled:
        engine = getattr(trainer.accelerator.deepspeed_engine_wrapped, "engine", None)
        return float(getattr(getattr(engine, "optimizer", None), "loss_scale", 1.0))
    scaler = getattr(trainer.accelerator, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


@contextlib.contextmanager
def unnoticed(model: nn.Module) -> Iterator[None]:
    """What runs inside the block leaves the model's buffers and the random states of Python and NumPy as they were.

    Those of torch are the business of what runs there, which needs them more than once.
    """
    python, numpy = random.getstate(), np.random.get_state()
    held = [
        (module, name, buffer, None if buffer is None else (buffer.clone(), buffer._version))
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        with torch.no_grad():
            for module, name, buffer, saved in held:
                module._buffers[name] = buffer
                if buffer is not None and saved is not None and buffer._version != saved[1]:
                    buffer.copy_(saved[0])


def learning_rate(trainer: Any, parameters: Sequence[nn.Parameter]) -> float | None:
    """What the step that comes applies to one block's parameters; of the first group where they do not train.

    None before there is an optimizer, or where it has no groups.
    """
    optimizer = trainer.optimizer
    if optimizer is None:
        return None
    wanted = {id(p) for p in parameters}
    groups = zero.groups(optimizer)
    inner = zero.innermost(optimizer).param_groups
    place = next((i for i, group in enumerate(groups) if any(id(p) in wanted for p in group)), 0)
    return float(inner[place]["lr"]) if inner else None
