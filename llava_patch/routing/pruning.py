"""What every pruning has: before one layer or several, the image tokens with the lowest scores leave for good.

A pruning is one dataclass in one file of this folder (`fastv`, `pyramid_drop`) that says what the scores are. Nothing
here imports torch, so that `import llava_patch` stays cheap; `routed_pass` calls it and makes the positions of the
layers above.
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
class Seen:
    """What a pruning may look at when it chooses.

    Attributes:
        image_mask: bool [batch, tokens], the image positions that come to the layer, among the tokens that do.
        attention: gives float32 [batch, tokens], the attention of each sample's raters (`Pruning.raters`) at the layer
            that is read, mean over heads and raters. Calling it costs these queries' attention; no backend is asked for
            attention, and no other row of it is made.
    """

    image_mask: Tensor
    attention: Callable[[], Tensor]


class Pruning:
    """Before some layers, each sample keeps some of its image tokens, those with the highest scores.

    The lower position wins ties, order and position ids stay. The choice is made once, at the prefill that brings the
    image, and stays with the cache; a token that left keeps the state that the last layer it saw gave it. Positions
    that are read (a label follows at once, or generation samples from them) are kept.
    """

    KIND: ClassVar[str] = "pruning"
    USES_ATTENTION: ClassVar[bool] = False
    """Whether `scores` calls `attention`, whose cost `llava-patch flops` then counts."""
    READS_NEXT: ClassVar[bool] = False
    """Whether `attention` is that of layer k itself, from its input, and not that of layer k-1."""
    MANY_RATERS: ClassVar[bool] = False
    """Whether `raters` says whose attention counts, and not each sample's last prompt token alone.

    `llava-patch flops` then counts all text as raters, which is the most.
    """

    training: bool
    """Whether it prunes in training mode too; the last token that is not padding then stands for the prompt's last."""

    @property
    def stages(self) -> tuple[int, ...]:
        """For each stage its k, the first layer without what it drops, in order; (): nothing is pruned."""
        raise NotImplementedError

    def keep_counts(self, stage: int, images: tuple[int, ...], protected: tuple[int, ...]) -> tuple[int, ...]:
        """How many image positions of each sample stay after a stage, never fewer than are read (`protected`).

        `images` are those that the sample began with.
        """
        raise NotImplementedError

    def scores(self, seen: Seen) -> Tensor:
        """The method's definition: how much each image token is worth.

        Returns:
            float [batch, tokens], tokens as in `seen`; what it says outside its `image_mask` is not read.
        """
        raise NotImplementedError

    def raters(self, embeds: Tensor, image_mask: Tensor, text_mask: Tensor) -> Tensor:
        """Whose attention counts, with `MANY_RATERS`: bool [batch, tokens], text positions.

        Asked once a call, of what comes to layer 0: `embeds` [batch, tokens, hidden] and, bool [batch, tokens], its
        image positions and its text positions up to the prompt's last token. A sample without any has the last one.
        """
        raise NotImplementedError

    @property
    def label(self) -> str:
        """The method with its settings, for a table."""
        raise NotImplementedError

    @property
    def described(self) -> str:
        """What it does, for a sentence: "75% of the image tokens at layer 2"."""
        raise NotImplementedError


@dataclass(frozen=True)
class OneStage(Pruning):
    """Before layer k, each sample keeps ceil((1 - r) * n) of its n image tokens; the rest as in `Pruning`.

    Attributes:
        layer: k >= 1, first layer without the pruned tokens.
        ratio: r, share of image tokens to prune, 0..1; 0 prunes nothing.
        training: prune in training mode too (the last token that is not padding then stands for the prompt's last).
    """

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
        """The one layer."""
        return (self.layer,) if self.ratio else ()

    def keep_counts(self, stage: int, images: tuple[int, ...], protected: tuple[int, ...]) -> tuple[int, ...]:
        """How many of the n image positions of each sample stay: ceil((1 - r) * n), but never fewer than are read."""
        return tuple(max(tokens_left(1 - self.ratio, n), p) for n, p in zip(images, protected, strict=True))

    @property
    def label(self) -> str:
        """Name(k, r)."""
        return f"{type(self).__name__}({self.layer}, {self.ratio})"

    @property
    def described(self) -> str:
        """Share and layer."""
        return f"{self.ratio:.0%} of the image tokens at layer {self.layer}"


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
