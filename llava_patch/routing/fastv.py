"""FastV: image tokens that the prompt's last token hardly looks at leave the decoder for good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_patch.routing.pruning import Pruning

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FastV(Pruning):
    """FastV: image tokens that the prompt's last token hardly looks at leave the decoder for good.

    Source: "An Image is Worth 1/2 Tokens After Layer 2" (FastV), section 4. Before layer k, each sample keeps the
    ceil((1 - r) * n) of its n image tokens that have the highest attention from the last prompt token at layer k-1,
    mean over heads; in a prompt of chunks, from the last token of the image's chunk. Settings and the rest (ties,
    positions that are read, what becomes of a token that left) are those of every `Pruning`.
    """

    USES_ATTENTION = True

    def scores(self, image_mask: Tensor, attention: Callable[[], Tensor]) -> Tensor:
        """The attention itself, float32 [batch, tokens]."""
        return attention()
