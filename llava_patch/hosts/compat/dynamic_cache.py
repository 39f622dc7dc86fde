"""The dynamic cache of every version, in one form; not imported before a cache is made, for it loads transformers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicCache

from llava_patch.core.errors import InputError
from llava_patch.hosts.compat.caches import listed_layers


class _ListedCache(DynamicCache):
    """A DynamicCache that keeps lists of tensors (up to 4.53), with what later ones bring."""

    key_cache: list[Tensor]
    value_cache: list[Tensor]
    layers = property(listed_layers)
    seen_tokens = _seen_tokens = property(lambda self: self.get_seq_length())

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add to a layer, also behind layers that were left out and hold nothing."""
        for held, new in ((self.key_cache, key_states), (self.value_cache, value_states)):
            held.extend(new[..., :0, :] for _ in range(len(held), layer_idx + 1))
            held[layer_idx] = torch.cat([held[layer_idx], new], dim=-2) if held[layer_idx].shape[-2] else new
        return self.key_cache[layer_idx], self.value_cache[layer_idx]

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Positions that a layer holds."""
        number = layer_idx or 0
        return self.key_cache[number].shape[-2] if number < len(self.key_cache) else 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sample."""
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples."""
        self._each(lambda x: x[indices.to(x.device)])

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.key_cache[:], self.value_cache[:] = map(change, self.key_cache), map(change, self.value_cache)

    def to_legacy_cache(self) -> Any:
        """The cache itself, which `generate` of 4.42 to 4.44 would return as a tuple: that knows no positions."""
        return self

    def __iter__(self) -> Any:
        """What takes this cache for a tuple would lose which positions its layers hold."""
        raise InputError(
            "a routed KV cache cannot be taken apart, as assisted decoding and contrastive search do on this version "
            "of transformers: generate without them (prompt_lookup_num_tokens, assistant_model, penalty_alpha), or "
            "install transformers 4.57 or newer"
        )

    def __getitem__(self, layer_idx: Any) -> Any:
        """As `__iter__`."""
        return iter(self)


Base: Any = DynamicCache if hasattr(cache_utils, "CacheLayerMixin") else _ListedCache
"""What a routed cache is made of."""
