"""Where a patched model keeps its handle, for code below the one that makes handles."""

from __future__ import annotations

from typing import Any

from torch import nn

from llava_patch.hosts.anatomy import unwrap

HANDLE = "_llava_patch_handle"


def get_handle(model: nn.Module) -> Any:
    """The `Handle` of a patched model; None when it is not patched."""
    return vars(unwrap(model)).get(HANDLE)
