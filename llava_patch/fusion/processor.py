"""How many placeholders HF's processor must write for an image, where a fusion changes the number of its tokens."""

from __future__ import annotations

from typing import Any

from llava_patch.fusion.taps import Taps
from llava_patch.hosts.anatomy import Anatomy


def fields(anatomy: Anatomy, taps: Taps) -> dict[str, int]:
    """Values of `LlavaProcessor` under which it counts as the fused model does.

    It counts (height // patch_size) * (width // patch_size) + num_additional_image_tokens, less one where the CLS token
    is dropped.

    Args:
        anatomy: a fused HF model.
        taps: its fusion.
    """
    cell = anatomy.patch_size * taps.merge_size
    rows, columns = (n * anatomy.patch_size // cell for n in anatomy.grid)
    further = taps.tokens(anatomy.grid) - rows * columns + int(anatomy.drops_cls)
    if not anatomy.drops_cls and taps.merge_size == 1:
        further += anatomy.vision_parts().prefix_tokens
    return {"patch_size": cell, "num_additional_image_tokens": further}


def fit(processor: Any, anatomy: Anatomy, taps: Taps) -> None:
    """Set these values on a processor, in place."""
    for name, value in fields(anatomy, taps).items():
        setattr(processor, name, value)
