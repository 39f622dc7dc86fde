"""FastV's choice: which image positions stay. Mathematics only."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def keep_counts(images: tuple[int, ...], ratio: float, protected: tuple[int, ...]) -> tuple[int, ...]:
    """How many image positions of each sample stay: ceil((1 - r) * n), but never fewer than are read.

    Args:
        images: n of each sample.
        ratio: r; taken as the nearest simple fraction, so that 0.7 of 10 leaves 3 and not 4, and 1/3 of 9 leaves 6.
        protected: positions of each sample that are read.
    """
    share = 1 - Fraction(ratio).limit_denominator(10**6)
    return tuple(max(math.ceil(share * n), p) for n, p in zip(images, protected, strict=True))


def choose(scores: Tensor, image_mask: Tensor, keep: tuple[int, ...], protected: Tensor | None = None) -> Tensor:
    """Choose the image positions with the highest scores; the lower position wins ties.

    Args:
        scores: float [batch, tokens], attention from the prompt's last token.
        image_mask: bool [batch, tokens], the candidates.
        keep: how many to keep in each sample.
        protected: bool [batch, tokens], candidates that stay whatever their score.

    Returns:
        bool [batch, tokens], a part of image_mask.
    """
    scores = scores.float().masked_fill(~image_mask, float("-inf"))
    if protected is not None:
        scores = scores.masked_fill(image_mask & protected, float("inf"))
    order = scores.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return image_mask & (rank < torch.tensor(keep, device=scores.device)[:, None])
