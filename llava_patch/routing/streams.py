"""The position sets that layers run on, each with its rotary embedding, its keys and its masks."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from llava_patch.hosts import compat
from llava_patch.routing.plan import Held, PositionSet

Rotary = tuple[Tensor, Tensor]


class Stream:
    """Some positions of one call, and the keys that they may look at.

    Masks are made once, when a layer first asks for them.
    """

    def __init__(self, config: Any, rotary: Rotary, count: int, keys: Held, example: Tensor, windowed: bool) -> None:
        """Describe a stream.

        Args:
            config: decoder configuration.
            rotary: (cos, sin) of the new positions.
            count: how many positions are new, padding included.
            keys: what its layers hold once this call is done: earlier positions, then the new ones.
            example: a tensor of the hidden states' dtype and device.
            windowed: whether a sliding window cuts off a part of the conversation.
        """
        self.config = config
        self.rotary = rotary
        self.count = count
        self.keys = keys
        self.position_ids: Tensor | None = None  # flash attention takes gaps for packed samples
        self._example = example
        self._windowed = windowed
        self._masks: dict[tuple, Any] = {}

    @functools.cached_property
    def cache_position(self) -> Tensor:
        """Places of the new keys in the layers' cache: int64 [new]."""
        return torch.arange(len(self.keys) - self.count, len(self.keys), device=self._example.device)

    @functools.cached_property
    def new(self) -> PositionSet:
        """The new positions, as places in the conversation."""
        return self._last(self.count)

    def _last(self, count: int) -> PositionSet:
        start = len(self.keys) - count
        valid = self.keys.valid
        return PositionSet(self.keys.index[:, start:], None if valid is None else valid[:, start:])

    def set_mask(self, backend: str, mask: Any) -> None:
        """Use the stock model's own mask."""
        self._masks[(backend, None)] = mask

    def mask(self, backend: str, last: int | None = None) -> Any:
        """The mask of a layer whose queries are the new positions, or the last few of them.

        Args:
            backend: attention backend that the layer runs.
            last: how many; None: all.
        """
        key = (backend, None if last is not None and last >= self.count else last)
        if key not in self._masks:
            self._masks[key] = self._make_mask(backend, last)
        return self._masks[key]

    def mask_among(self, asking: PositionSet) -> Tensor:
        """The mask of a layer whose queries are other places of the conversation than the last keys."""
        return compat.position_mask(self.config, asking.index, self.keys.index, self.keys.valid, self._example.dtype)

    def _make_mask(self, backend: str, last: int | None) -> Any:
        queries = self.count if last is None else last
        if self._windowed:
            return self.mask_among(self._last(queries))
        if queries == 1 and not self.keys.padded:
            return None
        states = self._example[:, :1].expand(-1, queries, -1)
        return compat.causal_mask(self.config, states, self.keys.valid, len(self.keys), backend)
