"""Hands a stock decoder layer keys and values that it did not compute in this call.

A layer's own forward takes its queries from the same positions as its keys. Where some positions only give keys and
values, the layer is called on the others with one of these in the place of its cache: whatever the attention backend,
the stock code does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.hosts import compat, projections

Merge = Callable[[Tensor, Tensor], Tensor]
Rotary = tuple[Tensor, Tensor]


def in_front(others: Tensor, own: Tensor) -> Tensor:
    """Keys or values of positions that all lie before the layer's own: [batch, heads, n, head_dim]."""
    return torch.cat([others, own], dim=2)


class Feed:
    """Stands in for a cache during one layer's call."""

    def __init__(self, cache: Any, key: Tensor, value: Tensor, merge: Merge) -> None:
        self.cache = cache
        self.key = key
        self.value = value
        self.merge = merge

    def merged_keys(self, own: Tensor) -> Tensor:
        """The keys that the layer's queries meet in this call: [batch, key_value_heads, keys, head_dim]."""
        return self.merge(self.key, own)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, cache_kwargs: Any = None) -> tuple[Tensor, Tensor]:
        """What a layer calls on its cache: merged keys and values, which the real cache takes as well."""
        key, value = self.merged_keys(key), self.merge(self.value, value)
        return (key, value) if self.cache is None else self.cache.update(key, value, layer_idx, cache_kwargs)


def call_with_keys(
    layer: nn.Module,
    hidden_states: Tensor,
    others: Tensor,
    *,
    rotary: Rotary,
    others_rotary: Rotary,
    merge: Merge,
    attention_mask: Any,
    past_key_values: Any,
) -> Tensor:
    """Run a decoder layer on some positions while others give keys and values only.

    Args:
        layer: a decoder layer.
        hidden_states: [batch, queries, hidden].
        others: [batch, n, hidden], the layer's input at the other positions.
        rotary: (cos, sin) of the queries.
        others_rotary: (cos, sin) of the others.
        merge: puts the others' and the own keys (or values) in the order that the mask counts.
        attention_mask: over the merged keys, and before them those that the cache holds.
        past_key_values: cache that takes the merged keys and values, or None.

    Returns:
        [batch, queries, hidden].
    """

    def run(hidden_states: Tensor, others: Tensor) -> Tensor:
        key, value = projections.keys_values(layer, others, others_rotary)
        feed = Feed(past_key_values, key, value, merge)
        return compat.call_layer(
            layer, hidden_states, attention_mask=attention_mask, position_embeddings=rotary, past_key_values=feed,
            use_cache=True, checkpoint=False,
        )  # fmt: skip

    return compat.checkpointed(layer, run, hidden_states, others)


def store_keys(layer: Any, states: Tensor, rotary: Rotary, past_key_values: Any) -> None:
    """Give a cache a layer's keys and values of positions, where nobody asks anything."""
    if past_key_values is not None:
        past_key_values.update(*projections.keys_values(layer, states, rotary), layer.self_attn.layer_idx)
