"""`llava-patch inspect`: what a checkpoint is and holds, from its files alone.

The names are loaded on first use: the console command knows this package, and should not load models' code to start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava_patch.tools.inspect.read import Inspection, inspect_checkpoint

__all__ = ["Inspection", "inspect_checkpoint"]


def __getattr__(name: str) -> object:
    """Load a public name on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llava_patch.tools.inspect import read

    return getattr(read, name)
