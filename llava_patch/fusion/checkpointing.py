"""Gradients for a tower whose lower blocks are frozen, under gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from llava_patch.core.undo import UndoStack
from llava_patch.hosts.anatomy import Anatomy

_FUNCTION = "_gradient_checkpointing_func"


class _WhereGradientsPass:
    """A block's checkpointing function that runs the block as it is where its input requires no gradient.

    A reentrant checkpoint would give none to the first block that trains. The frozen blocks below keep no activations
    anyway, so checkpointing that one block is all that is given up.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, function: Callable[..., Any], states: Tensor, *args: Any) -> Any:
        if not states.requires_grad:
            return function(states, *args)
        return self.function(function, states, *args)


def keep_gradients(anatomy: Anatomy, undo: UndoStack) -> None:
    """Let the first block that trains get its gradient where the blocks below it are frozen.

    Modifications: a forward pre-hook on the vision model, which wraps each block's checkpointing function once the host
    has set it (training scripts switch checkpointing on after the patch).
    """
    vision = anatomy.vision_model
    blocks = anatomy.vision_parts().blocks

    def wrap_checkpoints(module: nn.Module, args: Any) -> None:
        for block in blocks:
            function = vars(block).get(_FUNCTION)
            if function is not None and not isinstance(function, _WhereGradientsPass):
                setattr(block, _FUNCTION, _WhereGradientsPass(function))

    hook = vision.register_forward_pre_hook(wrap_checkpoints)

    def restore() -> None:
        hook.remove()
        for block in blocks:
            function = vars(block).get(_FUNCTION)
            if isinstance(function, _WhereGradientsPass):
                setattr(block, _FUNCTION, function.function)

    undo.push(restore)
