"""FastV: image tokens that the prompt's last token hardly looks at leave the decoder for good. Mathematics only.

Source: "An Image is Worth 1/2 Tokens After Layer 2", section 4. `FastV(layer=k, ratio=r)` acts before layer k, once, on
the call that brings the image:

1. The prompt's last token asks at layer k-1; its attention there, mean over heads, is each position's score
   (`attention_of_last`, from queries and keys: no backend is asked for attention).
2. Each sample keeps ceil((1 - r) * n) of its n image tokens, never fewer than are read (`keep_counts`): those with the
   highest scores, the lower position winning ties (`choose`).
3. Layers k and later run on the text and what was kept, in order and with their own position ids; a token that left
   keeps the state that layer k-1 gave it. The choice stays with the cache, and `select` repeats it where a context is
   recomputed. `routed_pass` calls this and makes the positions of the layers above.

`training=True` does the same in training mode, where the last token that is not padding stands for the prompt's last.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from llava_patch.hosts import projections
from llava_patch.routing.plan import Counts, PositionSet


def keep_counts(images: tuple[int, ...], ratio: float, protected: tuple[int, ...]) -> tuple[int, ...]:
    """How many image positions of each sample stay: ceil((1 - r) * n), but never fewer than are read.

    Args:
        images: n of each sample.
        ratio: r; taken as the nearest simple fraction, so that 0.7 of 10 leaves 3 and not 4, and 1/3 of 9 leaves 6.
        protected: positions of each sample that are read.
    """
    share = 1 - Fraction(ratio).limit_denominator(10**6)
    return tuple(max(math.ceil(share * n), p) for n, p in zip(images, protected, strict=True))


@torch.no_grad()
def attention_of_last(
    layer: Any, states: Tensor, last: Tensor, rotary: tuple[Tensor, Tensor], key: Tensor | None, allowed: Tensor
) -> Tensor:
    """Attention of each sample's last prompt token at a layer, mean over heads.

    Args:
        layer: decoder layer k-1.
        states: [batch, tokens, hidden], its input.
        last: int64 [batch], the column of that token.
        rotary: (cos, sin) of the tokens, each [batch or 1, tokens, head_dim].
        key: [batch, key_value_heads, keys, head_dim], the keys that its cache holds, those of `states` last; None:
            `states` give all of them.
        allowed: bool [batch, keys], what the token may see.

    Returns:
        float32 [batch, tokens].
    """
    at = PositionSet(last[:, None], None)
    query = projections.queries(layer, at.take(states), at.take_rotary(rotary))
    if key is None:
        key = projections.keys(layer, states, rotary)
    attention = projections.attention_of_query(query, key, allowed, float(layer.self_attn.scaling))
    return attention[:, attention.shape[1] - states.shape[1] :]


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


def select(
    scores: Tensor, image_mask: Tensor, valid: Tensor, counts: Counts, ratio: float, protected: Tensor | None
) -> tuple[Tensor, Counts]:
    """Which positions go on to layer k.

    Args:
        scores: float [batch, tokens], what `attention_of_last` returned.
        image_mask: bool [batch, tokens], without padding.
        valid: bool [batch, tokens], False at padding.
        counts: of these masks.
        ratio: r.
        protected: bool [batch, tokens], positions that are read; None: none.

    Returns:
        (bool [batch, tokens], text and what was kept of the image; counts of what is left).
    """
    keep = keep_counts(counts.image, ratio, counts.protected)
    kept = valid & (~image_mask | choose(scores, image_mask, keep, protected))
    return kept, replace(counts, image=keep)
