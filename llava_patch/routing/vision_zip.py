"""VisionZip: the patches that the vision tower's CLS token looks at stay, the others are merged into a few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_patch.routing.tower_pruning import TowerPruning, TowerView, put
from llava_patch.settings.checks import flag, integer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VisionZip(TowerPruning):
    """VisionZip: the patches that the vision tower's CLS token looks at stay, the others are merged into a few.

    Source: "VisionZip: Longer is Better but Not Necessary in Vision Language Models", section 3.2, and its repository.
    Attention and keys are those of the block whose output is the main feature (LLaVA-1.5: the last but one). Dominant
    are the CLS token and the patches with its highest attention; a tower without a CLS token (SigLIP) has those that
    all tokens look at most, on average. Of the other patches, every so many-th is a contextual token, to which the mean
    of those of the rest is added whose key (mean over heads) is most like its own.

    The CLS token, where the host drops it, takes the place of the first patch that leaves. Each image (anyres: each
    tile) has its own choice.

    Attributes:
        dominant: tokens that stay as they are, the CLS token, where there is one, among them.
        contextual: tokens that the other patches are merged into.
        training: prune in training mode too.
    """

    dominant: int = 54
    contextual: int = 10
    training: bool = False

    def __post_init__(self) -> None:
        integer("VisionZip", "dominant", self.dominant, 1)
        integer("VisionZip", "contextual", self.contextual, 0)
        flag("VisionZip", "training", self.training)

    @property
    def tokens(self) -> int:
        """Both kinds."""
        return self.dominant + self.contextual

    @property
    def label(self) -> str:
        """VisionZip(dominant, contextual)."""
        return f"VisionZip({self.dominant}, {self.contextual})"

    @property
    def described(self) -> str:
        """How many tokens stay."""
        return f"all but {self.tokens} tokens of an image before layer 0"

    def reduce(self, view: TowerView) -> tuple[Tensor, Tensor]:
        """Choose the dominant ones, and merge the others; see `TowerPruning.reduce`."""
        import torch

        features, images = view.features, len(view.features)
        by_attention = view.attention().argsort(dim=1, descending=True, stable=True)
        kept = torch.zeros_like(by_attention, dtype=torch.bool)
        kept.scatter_(1, by_attention[:, : self.dominant - view.has_cls], True)
        rest = kept.to(torch.uint8).argsort(dim=1, stable=True)[:, : -(self.dominant - view.has_cls) or None]
        count = rest.shape[1]
        every = max(1, count // max(1, self.contextual))
        chosen = torch.arange(0, count, every, device=rest.device)[: self.contextual]
        left = torch.ones(count, dtype=torch.bool, device=rest.device).index_fill(0, chosen, False).nonzero()[:, 0]
        if self.contextual:
            keys = view.keys[:, :, view.first :].mean(1).float()
            keys = keys.gather(1, rest[..., None].expand(-1, -1, keys.shape[2]))
            keys = keys / keys.norm(dim=-1, keepdim=True)
            nearest = (keys[:, left] @ keys[:, chosen].transpose(1, 2)).argmax(2)
            member = torch.nn.functional.one_hot(nearest, self.contextual).to(
                features.dtype
            )  # [images, left, contextual]
            others = features.gather(1, rest[..., None].expand(-1, -1, features.shape[2]))
            means = member.transpose(1, 2) @ others[:, left] / member.sum(1).clamp(min=1)[..., None]
            features = put(features, rest[:, chosen], others[:, chosen] + means)
            kept = kept.scatter(1, rest[:, chosen], True)
        if view.cls is not None:
            place = rest[:, left[:1]]
            features, kept = put(features, place, view.cls.view(images, 1, -1)), kept.scatter(1, place, True)
        return features, kept
