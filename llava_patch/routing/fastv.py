"""FastV: image tokens that the prompt's last token hardly looks at leave the decoder for good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_patch.routing.pruning import COUNTS, OneStage, Seen, tokens_left
from llava_patch.settings.checks import choice

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FastV(OneStage):
    """FastV: image tokens that the prompt's last token hardly looks at leave the decoder for good.

    Source: "An Image is Worth 1/2 Tokens After Layer 2" (FastV), section 4. Before layer k, each sample keeps the
    ceil((1 - r) * n) of its n image tokens that have the highest attention from the last prompt token at layer k-1,
    mean over heads; in a prompt of chunks, from the last token of the image's chunk. Settings and the rest (ties,
    positions that are read, what becomes of a token that left) are those of every `OneStage` pruning.

    Published code does not agree on what becomes of a share that is no whole number; it is one token of a sample.

    Attributes:
        count: "ceil" (the default: never fewer tokens than the ratio leaves, so an image loses all of them at ratio 1
            only, however short it is), "round" (as FastV's Hugging Face fork, half to even) or "int" (as others: down).
    """

    USES_ATTENTION = True

    count: str = "ceil"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("FastV", "count", self.count, COUNTS)

    def scores(self, seen: Seen) -> Tensor:
        """The attention itself, float32 [batch, tokens]."""
        return seen.attention()

    def keep_counts(self, stage: int, images: tuple[int, ...], protected: tuple[int, ...]) -> tuple[int, ...]:
        """As every pruning counts, but by the rule that `count` names."""
        left = (tokens_left(1 - self.ratio, n, self.count) for n in images)
        return tuple(map(max, left, protected))
