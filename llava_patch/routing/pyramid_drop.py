"""PyramidDrop: at several layers, the image tokens that the instruction's last token looks at least leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_patch.routing.pruning import Seen
from llava_patch.routing.staged import Staged

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PyramidDrop(Staged):
    """PyramidDrop: at several layers, the image tokens that the instruction's last token looks at least leave.

    Source: "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
    section 3, and its repository (Cooperx521/PyramidDrop). Before layer k of a stage, each sample keeps the image
    tokens to which layer k itself would give the highest attention from the last prompt token, mean over heads; FastV
    reads layer k-1. The defaults are the repository's for 32 layers: half of the tokens leave at each quarter of the
    depth.

    It differs from the repository in what is that of every `Pruning` here: position ids stay, where the repository
    counts the survivors anew at every stage, and in training the last token of the sample ranks, where the repository
    takes the mean over the last tokens before each answer.

    Settings are those of `Staged`.
    """

    USES_ATTENTION = True
    READS_NEXT = True

    def scores(self, seen: Seen) -> Tensor:
        """The attention itself, float32 [batch, tokens]."""
        return seen.attention()
