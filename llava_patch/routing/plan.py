"""Where image and text tokens go: index sets of a ragged batch. Mathematics only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PositionSet:
    """Some positions of each sample, in order, left-padded to the longest sample.

    Attributes:
        index: int64 [batch, n] places in the full sequence; padding points at some other place of the same sample.
        valid: bool [batch, n], False at padding; None when no sample needs padding.
    """

    index: Tensor
    valid: Tensor | None

    def take(self, values: Tensor) -> Tensor:
        """Gather rows: [batch or 1, tokens, channels] to [batch, n, channels]."""
        batch, n = self.index.shape
        index = self.index.to(values.device)
        if values.shape[0] == 1:
            return values[0].index_select(0, index.flatten()).view(batch, n, values.shape[-1])
        offset = torch.arange(batch, device=index.device)[:, None] * values.shape[1]
        return values.flatten(0, 1).index_select(0, (index + offset).flatten()).view(batch, n, values.shape[-1])


@dataclass(frozen=True)
class RoutingPlan:
    """Image and text positions of a batch and the way back.

    Attributes:
        image: the image positions.
        text: all other valid positions.
        restore: int64 [batch, tokens], each position's row in the concatenation [image set ; text set]; padding of
            the input points at row 0 (its content is never read).
    """

    image: PositionSet
    text: PositionSet
    restore: Tensor

    def merge(self, image_states: Tensor, text_states: Tensor) -> Tensor:
        """Put both streams back in order: [batch, n_image, d] and [batch, n_text, d] to [batch, tokens, d]."""
        rows = torch.cat([image_states, text_states.to(image_states.device)], dim=1)
        batch, n, channels = rows.shape
        restore = self.restore.to(rows.device) + torch.arange(batch, device=rows.device)[:, None] * n
        return rows.flatten(0, 1).index_select(0, restore.flatten()).view(batch, self.restore.shape[1], channels)


def make_plan(image_mask: Tensor, valid: Tensor | None) -> RoutingPlan:
    """Split a batch into image and text positions.

    One host-device synchronisation (the four extreme counts), whatever the batch.

    Args:
        image_mask: bool [batch, tokens].
        valid: bool [batch, tokens], False at padding; None when there is no padding.
    """
    if valid is None:
        valid = torch.ones_like(image_mask)
    image_mask = image_mask & valid
    text_mask = valid & ~image_mask
    counts = torch.stack([image_mask.sum(1), text_mask.sum(1)])
    (n_image, n_text), (min_image, min_text) = torch.stack([counts.amax(1), counts.amin(1)]).tolist()
    image = _positions(image_mask, counts[0], n_image, n_image != min_image)
    text = _positions(text_mask, counts[1], n_text, n_text != min_text)
    image_row = image_mask.cumsum(1) - 1 + (n_image - counts[0])[:, None]
    text_row = text_mask.cumsum(1) - 1 + (n_text - counts[1])[:, None] + n_image
    restore = torch.where(image_mask, image_row, torch.where(text_mask, text_row, torch.zeros_like(text_row)))
    return RoutingPlan(image, text, restore)


def _positions(mask: Tensor, counts: Tensor, n: int, ragged: bool) -> PositionSet:
    tokens = mask.shape[1]
    # A stable sort of 0/1 puts the wanted places last and keeps their order.
    index = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, tokens - n :]
    valid = torch.arange(n, device=mask.device)[None] >= n - counts[:, None] if ragged else None
    return PositionSet(index, valid)
