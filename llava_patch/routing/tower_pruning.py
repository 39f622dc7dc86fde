"""What a pruning has that chooses by what the vision tower computed: tokens leave before the decoder's first layer.

Such a method is one dataclass in one file of this folder (`vision_zip`, `pru_merge`); `reduce` is its definition.
`tower_hooks` shows it the tower's states and hands its choice on; the prompt keeps its placeholders, and the host its
checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llava_patch.core.errors import InputError
from llava_patch.routing.pruning import Pruning

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 128
"""Queries whose attention is held at a time."""


@dataclass(frozen=True, eq=False)
class TowerView:
    """What a tower says of some images (or tiles)."""

    features: Tensor  # [images, patches, channels], what the projector is to get of the patches
    # [images, channels], the same of the CLS token where the host drops it before the projector, else None
    cls: Tensor | None
    # [images, heads, n, head_dim]: the queries of one block whose attention counts, of its CLS token alone (n = 1), or
    # of all tokens where the tower has none
    queries: Tensor
    keys: Tensor  # [images, heads, tokens, head_dim], the keys of that block
    scaling: float  # factor on q.k before the softmax
    has_cls: bool  # whether the first token is a CLS token
    first: int  # place of the first patch among the tokens

    def attention(self) -> Tensor:
        """How much each patch is looked at: float32 [images, patches], mean over queries and heads."""
        total = 0
        for queries in self.queries.split(CHUNK, dim=2):
            scores = (queries @ self.keys.transpose(2, 3)).float() * self.scaling
            total = total + scores.softmax(-1).sum(2)
        return (total / self.queries.shape[2]).mean(1)[:, self.first :]  # type: ignore[attr-defined, no-any-return]


class TowerPruning(Pruning):
    """Before the decoder's first layer some image tokens leave, by what the vision tower computed.

    Order and position ids stay, and so does what is read, as in every pruning (`pruning.Pruning`). Images that are
    encoded outside of a call of the model are left as they are.
    """

    layer: ClassVar[int] = 0
    BEHIND: ClassVar[int] = 0
    """How many blocks behind the one whose output is the main feature the queries and keys are of."""
    NEEDS_CLS: ClassVar[bool] = False

    @property
    def tokens(self) -> int | None:
        """How many tokens stay of an image (or tile); None: it depends on the picture."""
        raise NotImplementedError

    @property
    def least_patches(self) -> int:
        """How many patches an image must have at least."""
        return 1 if self.tokens is None else self.tokens + 1

    def reduce(self, view: TowerView) -> tuple[Tensor, Tensor]:
        """The method's definition.

        Returns:
            (features as in `view`, merged where the method merges; bool [images, patches], which of them stay).
        """
        raise NotImplementedError

    @property
    def stages(self) -> tuple[int, ...]:
        """Before layer 0."""
        return (self.layer,)

    def keep_counts(self, stage: int, images: tuple[int, ...], protected: tuple[int, ...]) -> tuple[int, ...]:
        """What the decoder asks a pruning where nobody has chosen before: InputError."""
        raise InputError(
            f"{type(self).__name__} chooses by what the vision tower saw, but this call brings embeddings without "
            "pixels: give the model pixel_values (llava: images), or what was chosen before: "
            "handle.image_positions(mask, kept=...)"
        )


def put(features: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """`features` [images, patches, channels] with `values` [images, n, channels] at `places`, int64 [images, n]."""
    return features.scatter(1, places[..., None].expand_as(values), values.to(features.dtype))
