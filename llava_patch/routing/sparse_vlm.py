"""SparseVLM: at several layers, the image tokens that the words about the image look at least leave the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llava_patch.routing.pruning import Seen
from llava_patch.routing.staged import Staged

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SparseVLM(Staged):
    """SparseVLM: at several layers, the image tokens that the words about the image look at least leave the decoder.

    Source: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", section 3, and its
    repository (Gumpest/SparseVLMs, version 1.5). Raters are, of the text behind the sample's last image, the tokens
    that image tokens are more like than the mean, by the softmax over this text of the products of what comes to layer
    0, averaged over the image tokens. Before layer k of a stage stay the image tokens with the highest attention from
    the raters at layer k-1, mean over heads and raters.

    The default is the repository's schedule for 192 tokens on average; for 128 it has (303, 110, 36), for 96
    (238, 48, 26), for 64 (66, 30, 17). Those are tokens of one image of 576; for several images or tiles give shares.

    Not offered are what would break that a token which left keeps its state, and that positions stay: the repository
    merges 30 % of the tokens that leave into clusters, which it appends as further tokens ("recycling"), and counts
    positions anew. The rank that adapts the counts in the paper is not in the repository either, which has the lists.

    Settings are those of `Staged`.
    """

    USES_ATTENTION: ClassVar[bool] = True
    MANY_RATERS: ClassVar[bool] = True

    layers: tuple[int, ...] = (3, 7, 16)
    keep: tuple[float, ...] = (300, 200, 110)

    def raters(self, embeds: Tensor, image_mask: Tensor, text_mask: Tensor) -> Tensor:
        """Text behind the last image that the image is more like than the mean: bool [batch, tokens]."""
        import torch

        from llava_patch.routing.plan import positions

        behind = text_mask & (image_mask.flip(1).cumsum(1).flip(1) == 0)
        images, texts = torch.stack([image_mask.sum(1), behind.sum(1)]).tolist()
        rows, columns = positions(image_mask, tuple(images)), positions(behind, tuple(texts))
        alike = torch.matmul(rows.take(embeds), columns.take(embeds).transpose(1, 2)).float()
        of_image, of_text = rows.validity()[:, :, None], columns.validity()
        share = alike.masked_fill(~of_text[:, None], float("-inf")).softmax(2).masked_fill(~of_image, 0).sum(1)
        share = (share / of_image.sum(1)).masked_fill(~of_text, 0)
        chosen = of_text & (share > share.sum(1, keepdim=True) / of_text.sum(1, keepdim=True))
        return torch.zeros_like(image_mask).scatter(1, columns.index, chosen)

    def scores(self, seen: Seen) -> Tensor:
        """The raters' attention, float32 [batch, tokens]."""
        return seen.attention()
