"""`llava-patch inspect`: what a checkpoint is and holds, from its files alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_patch.inspection.read import Inspection, inspect_checkpoint

__all__ = ["Inspection", "inspect_checkpoint"]


def __getattr__(name: str) -> Any:
    # On demand: the console command imports this package for its help, which must not wait for torch.
    if name in __all__:
        from llava_patch.inspection import read

        return getattr(read, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
