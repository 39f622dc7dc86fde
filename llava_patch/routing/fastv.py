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

    Source: "An Image is Worth 1/2 Tokens After Layer 2" (FastV), section 4. Before layer k, each sample keeps
    ceil((1 - r) * n) of its n image tokens: those with the highest attention from the last prompt token at layer k-1,
    mean over heads; the lower position wins ties, order and position ids stay. The choice is made once, at the prefill
    that brings the image (of a prompt in chunks, by the last token of the image's chunk), and stays with the cache; a
    token that left keeps the state that layer k-1 gave it. Positions that are read (a label follows at once, or
    generation samples from them) are kept.

    Attributes:
        layer: k >= 1, first layer without the pruned tokens.
        ratio: r, share of image tokens to prune, 0..1; 0 prunes nothing.
        training: prune in training mode too (the last token that is not padding then stands for the prompt's last).
    """

    USES_ATTENTION = True

    def scores(self, image_mask: Tensor, attention: Callable[[], Tensor]) -> Tensor:
        """The attention itself."""
        return attention()
