"""What every pruning has: before one layer, the image tokens with the lowest scores leave the decoder for good.

A pruning is one dataclass in one file of this folder (`fastv`) that says what the scores are. Nothing here imports
torch, so that `import llava_patch` stays cheap; `routed_pass` calls it and makes the positions of the layers above.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from llava_patch.settings.checks import flag, fraction, integer

if TYPE_CHECKING:
    from torch import Tensor

COUNTS: dict[str, Callable[[Fraction], int]] = {"ceil": math.ceil, "round": round, "int": int}
"""Ways to make a whole number of a share of tokens: up, to the nearest (half to even, as Python's `round`), down."""


@dataclass(frozen=True)
class Pruning:
    """Before layer k, each sample keeps ceil((1 - r) * n) of its n image tokens, those with the highest scores.

    The lower position wins ties, order and position ids stay. The choice is made once, at the prefill that brings the
    image, and stays with the cache; a token that left keeps the state that layer k-1 gave it. Positions that are read
    (a label follows at once, or generation samples from them) are kept.

    Attributes:
        layer: k >= 1, first layer without the pruned tokens.
        ratio: r, share of image tokens to prune, 0..1; 0 prunes nothing.
        training: prune in training mode too (the last token that is not padding then stands for the prompt's last).
    """

    KIND: ClassVar[str] = "pruning"
    USES_ATTENTION: ClassVar[bool] = False
    """Whether `scores` calls `attention`, whose cost `llava-patch flops` then counts."""

    layer: int = 2
    ratio: float = 0.5
    training: bool = False

    def __post_init__(self) -> None:
        owner = type(self).__name__
        integer(owner, "layer", self.layer, 1)
        fraction(owner, "ratio", self.ratio, zero=True)
        flag(owner, "training", self.training)

    @property
    def stages(self) -> tuple[int, ...]:
        """The layers before which something leaves; (): nothing is pruned."""
        return (self.layer,) if self.ratio else ()

    @property
    def label(self) -> str:
        """Name(k, r), for a table."""
        return f"{type(self).__name__}({self.layer}, {self.ratio})"

    @property
    def described(self) -> str:
        """Share and layer, for a sentence."""
        return f"{self.ratio:.0%} of the image tokens at layer {self.layer}"

    def scores(self, image_mask: Tensor, attention: Callable[[], Tensor]) -> Tensor:
        """The method's definition: how much each image token is worth.

        Args:
            image_mask: bool [batch, tokens], the image positions that come to layer k.
            attention: gives float32 [batch, tokens], the attention of each sample's last prompt token at layer k-1,
                mean over heads. Calling it costs one query's attention; no backend is asked for attention.

        Returns:
            float [batch, tokens]; what it says outside `image_mask` is not read.
        """
        raise NotImplementedError

    def keep_counts(self, images: tuple[int, ...], protected: tuple[int, ...]) -> tuple[int, ...]:
        """How many of the n image positions of each sample stay: ceil((1 - r) * n), but never fewer than are read."""
        return tuple(max(tokens_left(1 - self.ratio, n), p) for n, p in zip(images, protected, strict=True))


def tokens_left(share: float, n: int, count: str = "ceil") -> int:
    """A share of n tokens as a whole number of them: `count` is one of `COUNTS`."""
    # The nearest simple fraction, so that 0.3 of 10 leaves 3 and not 4, and 2/3 of 9 leaves 6.
    return COUNTS[count](Fraction(share).limit_denominator(10**6) * n)


def choose_kept(scores: Tensor, image_mask: Tensor, keep: tuple[int, ...], protected: Tensor | None = None) -> Tensor:
    """Choose the `keep` image positions of each sample with the highest scores; the lower position wins ties.

    `scores` are float [batch, tokens]; `image_mask`, the candidates, and `protected`, those that stay whatever their
    score, are bool [batch, tokens], as is the choice.
    """
    scores = scores.float().masked_fill(~image_mask, float("-inf"))
    if protected is not None:
        scores = scores.masked_fill(image_mask & protected, float("inf"))
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return image_mask & (rank < rank.new_tensor(keep)[:, None])
