"""KV caches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llava_patch.core.undo import UndoStack
from llava_patch.hosts.compat.features import parameters_of
from llava_patch.hosts.zero import bare


def to_forget(asked: int, held: int) -> int:
    """How many of the `held` positions the argument of a cache's `crop` tells to forget.

    A negative number always says how many; else it says how many to keep, up to 5.1x. Since then 0 means none, and
    stock caches refuse a positive one, which still speaks for itself.
    """
    from transformers.cache_utils import DynamicCache

    if asked < 0 or (asked == 0 and "tokens_to_remove" in parameters_of(DynamicCache.crop)):
        return min(-asked, held)
    return max(held - asked, 0)


def new_cache(config: Any) -> Any:
    """An empty dynamic cache."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=config) if "config" in parameters_of(DynamicCache.__init__) else DynamicCache()


def as_cache(cache: Any) -> Any:
    """A cache as such: decoders of up to 4.4x give and take tuples of keys and values."""
    if not isinstance(cache, tuple):
        return cache
    from transformers.cache_utils import DynamicCache

    return DynamicCache.from_legacy_cache(cache)


def take_held(decoder: Any) -> Any:
    """The static cache that `generate` has given the attention modules themselves (4.38 to 4.40), else None.

    They lose it. Also None they have to lose, which the end of a generation leaves there: they would take it for the
    cache of every later call, and keep nothing.
    """
    attentions = [vars(bare(layer.self_attn)) for layer in decoder.layers if hasattr(layer, "self_attn")]
    return next(
        (held for held in [names.pop("past_key_value", None) for names in attentions] if held is not None), None
    )


@dataclass
class _Listed:
    """A layer of a cache that keeps lists of tensors (up to 4.53), as later ones have it."""

    cache: Any
    number: int

    keys = property(lambda self: self.cache.key_cache[self.number])
    values = property(lambda self: self.cache.value_cache[self.number])

    def crop(self, keep: int) -> None:
        """Keep so many positions; negative: forget so many."""
        self.cache.key_cache[self.number] = self.keys[..., :keep, :]
        self.cache.value_cache[self.number] = self.values[..., :keep, :]


def listed_layers(cache: Any) -> list[Any]:
    """The layers of a cache that keeps lists of tensors."""
    return [_Listed(cache, number) for number in range(len(cache.key_cache))]


def cache_layers(cache: Any) -> list[Any]:
    """The layers of a cache that hold something: `keys` and `values`, each [batch, key_value_heads, held, head_dim]."""
    layers = cache.layers if hasattr(cache, "layers") else listed_layers(cache)
    return [layer for layer in layers if isinstance(getattr(layer, "keys", None), Tensor)]


def keep_every_position(cache: Any) -> None:
    """Have no layer of a dynamic cache drop positions because its sliding window is over."""
    if not hasattr(cache, "layers"):
        return
    from transformers.cache_utils import DynamicLayer

    for layer in cache.layers:
        layer.__class__ = DynamicLayer
    cache.layer_class_to_replicate = DynamicLayer


def keep_beams(model: Any, routed: Any, undo: UndoStack) -> None:
    """Have beam search reorder a `routed` cache itself; in 4.37 to 4.4x it makes tuples of a Llama's.

    Modifications: the model's instance attribute `_temporary_reorder_cache`, where there is such a method.
    """

    def reorder(stock: Callable[..., Any], past_key_values: Any, beam_idx: Tensor) -> Any:  # as it is called
        if not isinstance(past_key_values, routed):
            return stock(past_key_values, beam_idx)
        past_key_values.reorder_cache(beam_idx)
        return past_key_values

    if hasattr(model, "_temporary_reorder_cache"):
        undo.wrap(model, "_temporary_reorder_cache", reorder)
