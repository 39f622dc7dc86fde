"""The learning rate at which an optimizer steps on some parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from llava_patch.hosts import zero


def learning_rate(trainer: Any, parameters: Sequence[nn.Parameter]) -> float | None:
    """What the step that comes applies to these parameters; of the first group where they do not train.

    Args:
        trainer: a Trainer that has begun to train.
        parameters: of one block.

    Returns:
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
