"""One stock decoder layer on some of the positions: its keys, its masks, and how it is called.

A layer's own forward takes its queries from the same positions as its keys. Where some positions only give keys and
values, the layer is called on the others with `ExternalKeys` in the place of its cache: whatever the attention backend,
the stock code does the rest.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.core.undo import holding
from llava_patch.hosts import compat, projections, zero
from llava_patch.routing.plan import KeyPositions, PositionSet

Rotary = tuple[Tensor, Tensor]


class Observer:
    """What a measurement may look at while the layers of a routed or pruned decoder run; a subclass overrides.

    A layer's hidden states do not say which positions they are of, and its keys may be of more positions than its
    queries. The side branch's layers are not told of.
    """

    def layer(self, number: int, asking: Tensor, giving: Tensor) -> None:
        """Called before every decoder layer.

        `asking`, int64 [batch, n], are the positions whose hidden states it gets, as places in the conversation;
        `giving`, int64 [batch, keys], those whose keys they look at, in the order of the tensors.
        """

    def side_output(self, states: Tensor) -> Tensor:
        """The side branch's output, [batch, image positions, hidden], as it leaves the branch; may return an alias."""
        return states

    def side_input(self, states: Tensor, number: int) -> Tensor:
        """The same, of the same shape, as layer `number` is about to read it; L stands for the decoder's end."""
        return states


_observer: ContextVar[Observer | None] = ContextVar("llava_patch_observer", default=None)


def observing(observer: Observer) -> contextlib.AbstractContextManager[Observer]:
    """Show the observer every routed pass inside the block."""
    return holding(_observer, observer)


def observer() -> Observer | None:
    """Who looks on; usually nobody."""
    return _observer.get()


@dataclass(eq=False)
class Stream:
    """Some positions of one call, and the keys that they may look at; masks are made when a layer first asks."""

    config: Any
    rotary: Rotary  # (cos, sin) of the new positions, each [batch or 1, new, head_dim]
    count: int  # how many positions are new, padding included
    keys: KeyPositions  # what its layers hold once this call is done: earlier positions, then the new ones
    example: Tensor  # of the hidden states' dtype and device
    windowed: bool  # whether a sliding window cuts off a part of the conversation
    position_ids: Tensor | None = None  # flash attention takes gaps for packed samples
    masks: dict[tuple[str, int | None], Any] = field(default_factory=dict)

    def last(self, count: int) -> PositionSet:
        """The last few positions, as places in the conversation."""
        start = len(self.keys) - count
        return self.keys.places.map(lambda x: x[:, start:])

    def mask(self, layer: Any, last: int | None = None) -> Any:
        """The mask, in the form of the layer's backend, where its queries are the new positions, or the `last` few."""
        backend = compat.backend_of(layer.self_attn)
        key = (backend, None if last is not None and last >= self.count else last)
        if key not in self.masks:
            queries = self.count if last is None else last
            if self.windowed:
                self.masks[key] = self.mask_among(self.last(queries))
            elif queries == 1 and not self.keys.padded:
                self.masks[key] = None
            else:
                states = self.example[:, :1].expand(-1, queries, -1)
                valid = self.keys.places.valid if self.keys.padded else None
                self.masks[key] = compat.causal_mask(self.config, states, valid, len(self.keys), backend)
        return self.masks[key]

    def mask_among(self, asking: PositionSet) -> Tensor:
        """The mask, [batch, 1, queries, keys], of a layer whose queries are other places than the last keys."""
        keys = self.keys.places
        return compat.position_mask(self.config, asking.index, keys.index, keys.valid, self.example.dtype)


@dataclass(eq=False)
class ExternalKeys:
    """Stands in for a cache during one layer's call: keys and values of positions that the layer is not called on.

    They are projected when the layer asks: its weights are there then, also where an engine keeps them in parts.
    """

    cache: Any
    give: Callable[[], tuple[Tensor, Tensor]]
    merge: Callable[[Tensor, Tensor], Tensor]

    def merged_keys(self, own: Tensor) -> Tensor:
        """The keys that the layer's queries meet in this call: [batch, key_value_heads, keys, head_dim]."""
        return self.merge(self.give()[0], own)

    def get_usable_length(self, new: int, layer_idx: int) -> int:
        """How many keys a call of the layer has beside its `new` own ones; layers of up to 4.4x ask before `update`."""
        key = self.give()[0][:, :1, :, :1]
        merged = self.merge(key, key.new_empty(len(key), 1, new, 1)).shape[2]
        return merged - new + (0 if self.cache is None else int(self.cache.get_seq_length(layer_idx)))

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What a layer calls on its cache: merged keys and values, [batch, key_value_heads, keys, head_dim] each."""
        others = self.give()
        key, value = self.merge(others[0], key), self.merge(others[1], value)
        return (key, value) if self.cache is None else self.cache.update(key, value, *args, **kwargs)


def call_with_keys(
    layer: nn.Module,
    hidden_states: Tensor,
    others: Tensor,
    *,
    rotary: Rotary,
    others_rotary: Rotary,
    merge: Callable[[Tensor, Tensor], Tensor],
    attention_mask: Any,
    cache: Any,
) -> Tensor:
    """Run a decoder layer on some positions, [batch, queries, hidden], while others give keys and values only.

    `others` [batch, n, hidden] is the layer's input there; `rotary` and `others_rotary` are (cos, sin) of both. `merge`
    puts the others' and the own keys (or values) in the order that `attention_mask` counts, after those that `cache`
    holds, which takes the merged ones (None: there is no cache).
    """

    def run(hidden_states: Tensor, others: Tensor) -> Tensor:
        give = functools.partial(projections.keys_values, layer, others, others_rotary)
        external = ExternalKeys(cache, give, merge)
        return compat.call_layer(
            layer, hidden_states, attention_mask=attention_mask, position_embeddings=rotary, cache=external,
            use_cache=True, checkpoint=False,
        )  # fmt: skip

    return compat.checkpointed(layer, run, prime(hidden_states, layer), others)


def trains(modules: Iterable[nn.Module]) -> bool:
    """Whether a gradient is wanted for any parameter of some modules."""
    return torch.is_grad_enabled() and any(p.requires_grad for m in modules for p in m.parameters())


def prime(states: Tensor, layer: nn.Module) -> Tensor:
    """States [batch, n, hidden] that want a gradient if the layer trains: reentrant checkpointing gives none else."""
    if not states.requires_grad and trains([layer]):
        states = states.detach().requires_grad_()
    return states


@torch.no_grad()
def attention_of(
    layer: Any, states: Tensor, raters: PositionSet, rotary: Rotary, held: Tensor | None, allowed: Tensor,
    *, ahead: bool = False,
) -> Tensor:  # fmt: skip
    """Attention of some tokens of each sample at a layer, mean over heads and these: float32 [batch, tokens].

    `states` [batch, tokens, hidden] is the layer's input, `raters` which columns of it ask, `rotary` (cos, sin) of the
    tokens, each [batch or 1, tokens, head_dim]. `held` [batch, key_value_heads, keys, head_dim] are the keys that the
    layer's cache holds (None: no cache), those of `states` last, or, where the layer is yet to run (`ahead`), not at
    all. `allowed` is bool [batch, raters, keys], what each may see; those that are padding count for nothing.
    """
    query = projections.queries(layer, raters.take(states), raters.take_rotary(rotary))
    key = held
    if held is None or ahead or zero.is_partitioned(layer.parameters()):  # a rank without an image has no cache to read
        own = projections.keys(layer, states, rotary)
        key = own if held is None else torch.cat([held, own], dim=2) if ahead else held
    assert key is not None
    attention = projections.attention_of_queries(query, key, allowed, compat.scaling(layer.self_attn))
    attention = attention[:, :, attention.shape[2] - states.shape[1] :]
    if raters.valid is None:
        return attention.mean(1)
    valid = raters.valid[:, :, None].to(attention.device)
    return attention.masked_fill(~valid, 0).sum(1) / valid.sum(1)
