"""Gradients for a tower whose lower blocks are frozen, under gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from llava_patch.hosts.anatomy import Anatomy
from llava_patch.routing.autograd import prime
from llava_patch.undo import UndoStack

_FUNCTION = "_gradient_checkpointing_func"


class _Primed:
    """A block's checkpointing function, for reentrant checkpoints: one input must require a gradient, or none comes."""

    def __init__(self, function: Callable[..., Any], block: nn.Module) -> None:
        self.function = function
        self.block = block

    def __call__(self, function: Callable[..., Any], states: Tensor, *args: Any) -> Any:
        states = prime(states, self.block)
        if not states.requires_grad:  # frozen up to here: there is nothing to recompute, torch would only warn
            return function(states, *args)
        return self.function(function, states, *args)


def keep_gradients(anatomy: Anatomy, undo: UndoStack) -> None:
    """Let the first block that trains get its gradient where the blocks below it are frozen.

    Only that block's input is cut off and made to require a gradient, so nothing runs backward through frozen blocks.

    Modifications: a forward pre-hook on the vision model, which wraps each block's checkpointing function once the host
    has set it (training scripts switch checkpointing on after the patch).
    """
    vision = anatomy.vision_model
    blocks = anatomy.vision_parts().blocks

    def prime_checkpoints(module: nn.Module, args: Any) -> None:
        for block in blocks:
            function = vars(block).get(_FUNCTION)
            if function is not None and not isinstance(function, _Primed):
                setattr(block, _FUNCTION, _Primed(function, block))

    hook = vision.register_forward_pre_hook(prime_checkpoints)

    def restore() -> None:
        hook.remove()
        for block in blocks:
            function = vars(block).get(_FUNCTION)
            if isinstance(function, _Primed):
                setattr(block, _FUNCTION, function.function)

    undo.push(restore)
