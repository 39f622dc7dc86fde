"""Static caches, as transformers has them layer by layer (4.56 on); not imported before a cache is made."""

from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from llava_patch.hosts.compat.features import parameters_of

StaticCache: Any = getattr(cache_utils, "StaticCache", None)
StaticLayer: Any = getattr(cache_utils, "StaticLayer", None)
BaseLayer: Any = getattr(cache_utils, "CacheLayerMixin", object)


def has_static_layers() -> bool:
    """Whether each layer of a static cache is told its own length, and counts no positions of its own (5.2x on)."""
    counts = hasattr(BaseLayer, "get_max_length")  # tokens were seen to differ there from a dynamic cache's
    return StaticLayer is not None and not counts and "max_cache_len" in parameters_of(StaticLayer.__init__)


def is_static(cache: Any) -> bool:
    """Whether this is transformers' own static cache, or made of one."""
    return StaticCache is not None and isinstance(cache, StaticCache)


def longest(cache: Any) -> int:
    """How many positions a static cache takes."""
    return max(int(layer.max_cache_len) for layer in cache.layers)


def held_keys(cache: Any) -> tuple[int, list[tuple[Tensor, Tensor]]]:
    """What a stock static cache holds so far: how many positions, and the keys and values of its layers.

    They are views, [batch, key_value_heads, positions, head_dim]. Asks the device once.
    """
    layers = [layer for layer in cache.layers if isinstance(layer.keys, Tensor)]
    if not layers:
        return 0, []
    length = int(cache.get_seq_length())
    return length, [(layer.keys[:, :, :length], layer.values[:, :, :length]) for layer in layers]


def fixed(*tensors: Tensor) -> None:
    """Say of tensors that they stay where they are: what is compiled then writes to them instead of to copies."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)
