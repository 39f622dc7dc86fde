"""What trains in the vision tower, and how gradients reach it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.core.errors import HostError, SettingError
from llava_patch.core.undo import UndoStack
from llava_patch.fusion.base import Fusion
from llava_patch.fusion.taps import Taps
from llava_patch.hosts.anatomy import Anatomy, when_loaded

_FUNCTION = "_gradient_checkpointing_func"


def set_tower_flags(anatomy: Anatomy, settings: Fusion, taps: Taps) -> None:
    """Set requires_grad in the vision tower as `train_tower` says; SettingError: more blocks asked for than are used.

    Blocks above the deepest feature that carries a gradient never train, nor does the final norm unless that feature is
    read through it: nothing would give them a gradient.
    """
    vision = anatomy.vision_model
    if vision is None:
        return
    tower = anatomy.vision_parts()
    vision.requires_grad_(False)
    if settings.train_tower == "frozen":
        return
    used = list(tower.blocks[: taps.deepest])
    if settings.train_tower == "all":
        parts: list[nn.Module] = [*tower.before, *used, *tower.final_norm(taps.deepest)]
    else:
        k = int(settings.train_tower)
        if k > len(used):
            raise SettingError(
                f"{type(settings).__name__}.train_tower = {k}: only {len(used)} blocks of this tower are used"
            )
        parts = [*used[len(used) - k :], *tower.final_norm(taps.deepest)]
    for part in parts:
        part.requires_grad_(True)
    if settings.train_tower == "all":
        for parameter in tower.own:
            parameter.requires_grad_(True)
    for parameter in tower.idle:
        parameter.requires_grad_(False)


def let_tower_train(anatomy: Anatomy, undo: UndoStack) -> None:
    """Make gradients reach the tower; see `keep_gradients` and `lift_no_grad` for the modifications."""
    when_loaded(anatomy, undo, lambda late: keep_gradients(anatomy, late))
    if anatomy.tower_apart:
        lift_no_grad(anatomy, undo)


def lift_no_grad(anatomy: Anatomy, undo: UndoStack) -> None:
    """Run `llava`'s tower with gradients while something in it asks for one (HostError: its forward has no `no_grad`).

    Modifications: the tower's instance attribute `forward`.
    """
    tower = anatomy.tower
    original = tower.forward
    undecorated = getattr(type(tower).forward, "__wrapped__", None)
    if undecorated is None:
        raise HostError(f"{type(tower).__name__}.forward is not under torch.no_grad() as LLaVA's is: cannot lift it")

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters()):
            return undecorated(tower, *args, **kwargs)
        return original(*args, **kwargs)

    undo.set_attribute(tower, "forward", forward)


@dataclass(eq=False)
class _WhereGradientsPass:
    """A block's checkpointing function that runs the block as it is where its input requires no gradient.

    A reentrant checkpoint would give none to the first block that trains. The frozen blocks below keep no activations
    anyway, so checkpointing that one block is all that is given up.
    """

    function: Callable[..., Any]

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
