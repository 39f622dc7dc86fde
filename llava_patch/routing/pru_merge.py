"""PruMerge: the patches that stand out in the CLS token's attention stay, each with its nearest ones added to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llava_patch.routing.tower_pruning import TowerPruning, TowerView, put
from llava_patch.settings.checks import flag, integer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PruMerge(TowerPruning):
    """PruMerge: the patches that stand out in the CLS token's attention stay, each with its nearest ones added to it.

    Source: "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", section 3, and its
    repository. Attention and keys are those of the block behind the main feature (LLaVA-1.5: the last), all heads taken
    as one. A patch stays where its attention is above the third quartile by 1.5 times the distance of the quartiles,
    so that each image has its own number of them. To each the `neighbours` patches with the most similar keys are
    added, weighed by their attention. One more token, in the place of the first patch that leaves, is the sum of all
    that leave, weighed so too.

    Attributes:
        plus: PruMerge+: patches at even distances stay too, about three for one that stands out.
        neighbours: how many patches are added to one that stays.
        training: prune in training mode too.
    """

    BEHIND: ClassVar[int] = 1
    NEEDS_CLS: ClassVar[bool] = True

    plus: bool = True
    neighbours: int = 32
    training: bool = False

    def __post_init__(self) -> None:
        flag("PruMerge", "plus", self.plus)
        integer("PruMerge", "neighbours", self.neighbours, 1)
        flag("PruMerge", "training", self.training)

    @property
    def tokens(self) -> None:
        """Each picture's own number."""
        return None

    @property
    def least_patches(self) -> int:
        """The neighbours, and the one whose they are."""
        return self.neighbours + 1

    @property
    def label(self) -> str:
        """PruMerge or PruMerge+."""
        return "PruMerge+" if self.plus else "PruMerge"

    @property
    def described(self) -> str:
        """What stays."""
        return "all but the patches that stand out, before layer 0"

    def reduce(self, view: TowerView) -> tuple[Tensor, Tensor]:
        """Choose what stands out, and merge the rest; see `TowerPruning.reduce`."""
        import torch

        features, patches = view.features, view.features.shape[1]
        query, keys = (x.transpose(1, 2).flatten(2) for x in (view.queries, view.keys))  # all heads as one
        scores = (query @ keys.transpose(1, 2)).float() * keys.shape[2] ** -0.5
        attention = scores.softmax(-1)[:, 0, view.first :]
        low, high = torch.quantile(attention, torch.tensor([0.25, 0.75], device=attention.device), dim=1)
        stays = attention > (high + 1.5 * (high - low))[:, None]
        if self.plus:
            places = torch.arange(patches, device=stays.device)[None]
            every = (patches // stays.sum(1, keepdim=True).clamp(min=1) // 3).clamp(min=1)
            stays = stays | ((places % every == 0) & (places < patches - 1))
        keys = torch.nn.functional.normalize(keys[:, view.first :].float(), dim=-1)
        alike = keys @ keys.transpose(1, 2)
        alike.diagonal(dim1=1, dim2=2).fill_(float("-inf"))
        nearest = alike.topk(self.neighbours, dim=2).indices
        weights = attention[:, None].expand(-1, patches, -1)
        weights = torch.zeros_like(weights).scatter(2, nearest, weights.gather(2, nearest)).to(features.dtype)
        merged = torch.where(stays[..., None], features + weights @ features, features)
        rest = ((attention * ~stays).to(features.dtype)[:, None] @ features)[:, 0]
        place = stays.long().argmin(1, keepdim=True)
        # Where no patch leaves, the place is one that stays, and keeps what it has.
        here = merged.gather(1, place[..., None].expand(-1, -1, merged.shape[2]))[:, 0]
        rest = torch.where(stays.all(1, keepdim=True), here, rest)
        return put(merged, place, rest[:, None]), stays.scatter(1, place, True)
