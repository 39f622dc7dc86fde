"""What must wait until the vision tower has its weights: `llava` loads them after the language model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llava_patch.core.undo import UndoStack
from llava_patch.hosts.anatomy import Anatomy


def when_loaded(anatomy: Anatomy, undo: UndoStack, work: Callable[[UndoStack], object]) -> None:
    """Do something once the tower is loaded: now, or right after the host has loaded it.

    Modifications: on `llava`, while the tower is not loaded yet, its instance attribute `load_model`.

    Args:
        anatomy: the host model.
        undo: takes the change back.
        work: what to do, given where to note how it is taken back; what it raises reaches whoever loads the tower.
    """
    late = UndoStack()  # has its place in the order now, whatever is applied until the tower is there
    undo.push(late.unwind)
    if anatomy.vision_model is not None:
        work(late)
        return
    tower = anatomy.tower
    load_model = tower.load_model

    @functools.wraps(load_model)
    def load_and_work(*args: Any, **kwargs: Any) -> None:
        was_loaded = tower.is_loaded
        load_model(*args, **kwargs)
        if not was_loaded:
            work(late)

    undo.set_attribute(tower, "load_model", load_and_work)
