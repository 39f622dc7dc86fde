"""A KV cache whose layers differ in length, and what decode needs to know of the prompt.

Layers below the split and fusion layers hold every position, text-only layers the text positions. Which of the latter
are padding travels here, with the cache, never with the model: two generations may interleave, and beams expand and
reorder it with the keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from llava_patch.errors import InputError


class RoutedCache(DynamicCache):
    """DynamicCache of a routed prompt.

    Attributes:
        text_length: number of positions that text-only layers hold (padding included).
        text_valid: bool [batch, text_length], False at padding; None when no sample is padded.
    """

    text_length: int
    text_valid: Tensor | None

    @classmethod
    def adopt(cls, cache: Any, text_length: int, text_valid: Tensor | None) -> "RoutedCache":
        """Turn an empty DynamicCache, which `generate` has made, into a routed one, in place.

        Raises:
            InputError: another kind of cache, or one that already holds tokens.
        """
        cls.check(cache)
        if cache.get_seq_length() > 0:
            raise InputError(
                "an image arrives in a conversation whose KV cache was already built; this version routes images only "
                "in the first prompt: start from an empty cache"
            )
        cache.__class__ = cls
        routed: RoutedCache = cache  # type: ignore[assignment]
        routed.text_length = text_length
        routed.text_valid = text_valid
        return routed

    @classmethod
    def check(cls, cache: Any) -> None:
        """Refuse a cache whose layers cannot differ in length.

        Raises:
            InputError: names the cache's class and the option that chose it.
        """
        if cache is not None and type(cache) is not DynamicCache and type(cache) is not cls:
            raise InputError(
                f"routing needs a dynamic KV cache, got {type(cache).__name__}: do not set cache_implementation, or "
                'set it to "dynamic"'
            )

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Positions in a layer; by default in the last one, a fusion layer, which holds every position."""
        if not self.layers:
            return 0
        return super().get_seq_length(len(self.layers) - 1 if layer_idx is None else layer_idx)

    def get_mask_sizes(self, cache_position: Tensor, layer_idx: int) -> tuple[int, int]:
        """Key length and offset for a mask over every position (the layer that transformers names is the first)."""
        return super().get_mask_sizes(cache_position, max(0, len(self.layers) - 1))

    def append_text(self, count: int, valid: Tensor | None) -> None:
        """Count new text positions.

        Args:
            count: how many.
            valid: bool [batch, count]; None: all valid.
        """
        known = valid if self.text_valid is None else self.text_valid
        if known is not None:  # as soon as one part has padding, the other must say that it has none
            old, new = (
                known.new_ones(known.shape[0], n) if part is None else part.to(known.device)
                for part, n in ((self.text_valid, self.text_length), (valid, count))
            )
            self.text_valid = torch.cat([old, new], dim=1)
        self.text_length += count

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder samples (beam search)."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        if self.text_valid is not None:
            self.text_valid = self.text_valid.index_select(0, beam_idx.to(self.text_valid.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sample (several return sequences)."""
        super().batch_repeat_interleave(repeats)
        if self.text_valid is not None:
            self.text_valid = self.text_valid.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples."""
        super().batch_select_indices(indices)
        if self.text_valid is not None:
            self.text_valid = self.text_valid[indices.to(self.text_valid.device)]

    def crop(self, max_length: int) -> None:
        """Refused: layers differ in length, so one length cannot crop them all."""
        raise InputError("a routed KV cache cannot be cropped (assisted decoding and contrastive search need that)")

    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(
            t.numel() * t.element_size() for layer in self.layers for t in (layer.keys, layer.values) if t is not None
        )
