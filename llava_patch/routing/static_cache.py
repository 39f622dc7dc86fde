"""A static KV cache whose layers differ in length, and a step of decoding behind it that compiles as one graph.

A call of several tokens runs with a dynamic cache (`RoutedPass`), which is opened out of the static one and laid into
it afterwards. A step of one text token (`step`) reads and writes the buffers in place: where it stands is in tensors on
the device, so nothing is asked of them and no number changes in Python.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from llava_patch.core.errors import InputError
from llava_patch.hosts import compat
from llava_patch.hosts.compat import static_cache
from llava_patch.routing.cache import FULL, TEXT, RoutedCache, cache_bytes, kept_after
from llava_patch.routing.plan import PositionSet
from llava_patch.routing.schedule import LayerMode, LayerSchedule


def stream_names(schedule: LayerSchedule) -> tuple[str, ...]:
    """The kind of positions that each layer holds, [L]."""
    names, here = [], FULL
    for number, mode in enumerate(schedule.modes):
        if number in schedule.stages:
            here = kept_after(schedule.stages[number])
        names.append(TEXT if mode is LayerMode.TEXT else here)
    return tuple(names)


@dataclass(eq=False)
class Slots:
    """The slots that layers of one kind have for positions; the next one is written to in every step."""

    at: Tensor  # int64 [1], the next slot; those from there on are empty
    valid: Tensor  # bool [batch, slots], False at padding, True where nothing has been written yet
    number: Tensor  # int64 [slots], 0, 1, ...

    def mask(self, example: Tensor, additive: bool) -> Tensor:
        """What the token in the next slot sees, itself included: [batch, 1, 1, slots], bool or 0 and a large negative.

        `example` is of the hidden states' dtype.
        """
        seen = (self.valid & (self.number <= self.at))[:, None, None]
        if not additive:
            return seen
        return torch.zeros_like(seen, dtype=example.dtype).masked_fill(~seen, torch.finfo(example.dtype).min)


class StaticStreamLayer(static_cache.BaseLayer):  # type: ignore[misc]
    """A layer's buffers, [batch, key_value_heads, slots, head_dim]; only as many slots as its kind of layers needs."""

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, slots: Slots, longest: int) -> None:
        super().__init__()
        self.keys, self.values, self.slots = keys, values, slots
        self.max_batch_size, self.max_cache_len = len(keys), longest  # of the conversation, as `generate` reads it
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """The buffers are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write a step's keys and values, [batch, key_value_heads, 1, head_dim], and give all slots."""
        self.keys.index_copy_(2, self.slots.at, key_states)
        self.values.index_copy_(2, self.slots.at, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Of the masks that `generate` makes: over the whole conversation."""
        return self.max_cache_len, 0

    def get_max_cache_shape(self) -> int:
        """The positions that the conversation may have."""
        return self.max_cache_len

    def get_seq_length(self) -> int:
        """Positions that it holds; asks the device."""
        return int(self.slots.at)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder samples, in place."""
        for buffer in (self.keys, self.values):
            buffer.copy_(buffer.index_select(0, beam_idx.to(buffer.device)))


class RoutedStaticCache(static_cache.StaticCache or object):  # type: ignore[misc]
    """StaticCache of a routed conversation; `reset()` makes a stock one of it again."""

    layers: list[Any]  # `StaticStreamLayer`
    schedule: LayerSchedule  # as in `RoutedCache`
    stepping: bool  # whether a step is under way (`hosts.steps`); nothing else may add keys
    book: RoutedCache  # what is known of the conversation up to the last call; without keys
    slots: dict[str, Slots]  # by kind of layer
    names: tuple[str, ...]  # each layer's kind
    stock_layers: list[Any]  # what it has as a stock cache
    argument: str  # what the decoder's layers call it

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a step's keys and values, each [batch, key_value_heads, 1, head_dim], and give all that a layer has.

        InputError: the caller is no step of a routed model, which knows the positions.
        """
        if not self.stepping:
            raise InputError(
                "this KV cache was filled by a routed model, but the model that goes on with it is not routed (was the "
                "patch removed?): start from an empty cache"
            )
        return self.layers[layer_idx].update(key_states, value_states)

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Positions that a layer holds; without an argument, positions of the conversation. Asks the device."""
        return int((self.slots[FULL] if layer_idx is None else self.layers[layer_idx].slots).at)

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Of the masks that `generate` makes: over the whole conversation."""
        return self.layers[0].get_mask_sizes()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder samples (beam search), in place; `beam_idx` is int64 [batch]."""
        super().reorder_cache(beam_idx)
        for slots in self.slots.values():
            slots.valid.copy_(slots.valid.index_select(0, beam_idx.to(slots.valid.device)))
        self.book.rearrange(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def reset(self) -> None:
        """An empty stock cache again; the routed buffers wait for the next conversation, and stay where they are."""
        self.__dict__[_WAITING] = {"layers": self.layers, "slots": self.slots, "names": self.names}
        for layer in self.stock_layers:
            layer.max_batch_size = self.layers[0].max_batch_size  # `generate` asks, also what nobody has filled yet
        self.layers = self.stock_layers
        self.__class__ = static_cache.StaticCache
        for name in ("schedule", "book", "slots", "names", "stock_layers", "argument", "stepping"):
            del self.__dict__[name]
        self.reset()

    def kept(self) -> Tensor:
        """As `RoutedCache.kept`."""
        return self.books_now().kept()

    def nbytes(self) -> int:
        """Bytes held: the buffers of every layer, and what the side branch remembers."""
        return cache_bytes(self) + self.book.nbytes()

    def books_now(self) -> RoutedCache:
        """What is known of the conversation up to the last step, in a cache of its own; asks the device."""
        book, full = self.book.without_keys(), self.slots[FULL]
        start, stop = book.length, int(full.at)
        if stop > start:
            valid = full.valid[:, start:stop]
            new = PositionSet.run(start, stop, len(valid), valid.device, valid)
            for name in book.streams:
                book.extend(name, stop - start if bool(valid.all()) else new)
            book.length = stop
        return book


_WAITING = "_llava_patch_buffers"


def takes(cache: Any) -> bool:
    """Whether a cache is a static one that can be routed here."""
    return static_cache.is_static(cache) and static_cache.has_static_layers()


def check(cache: Any, schedule: LayerSchedule, decoder: Any) -> None:
    """Refuse (InputError) what a static cache cannot be or do under routing."""
    if isinstance(cache, RoutedStaticCache):
        RoutedCache.check_schedule(cache, schedule)
    if getattr(cache, "offloading", False):
        raise InputError(
            'routing needs a KV cache on the device: set cache_implementation = "static" instead of "offloaded_static"'
        )
    window = compat.sliding_window(decoder.config)
    if window is not None and static_cache.longest(cache) >= window:
        raise InputError(
            f"routing needs a static KV cache that is shorter than the sliding window of {window} positions: generate "
            "fewer tokens, or do not set cache_implementation"
        )
    if compat.attention_of(decoder.config).startswith("flash_attention"):
        raise InputError(
            'a static KV cache needs masks that flash attention does not know: set attn_implementation = "sdpa", or do '
            "not set cache_implementation"
        )
    if len({parameter.device for layer in decoder.layers for parameter in layer.parameters()}) > 1:
        raise InputError(
            "a static KV cache needs the decoder on one device here, and its layers are on several (device_map): do "
            "not set cache_implementation"
        )
    if torch.is_grad_enabled() or decoder.training:
        raise InputError(
            "a static KV cache is for generation and keeps no gradients: call the model under torch.no_grad() and "
            "after model.eval(), or do not give it a static cache"
        )


def opened(cache: Any, config: Any) -> Any:
    """A dynamic cache that holds what a static one holds so far; that one stays as it is."""
    if not isinstance(cache, RoutedStaticCache):
        new = compat.new_cache(config)
        for number, (keys, values) in enumerate(static_cache.held_keys(cache)[1]):
            new.update(keys, values, number)
        return new
    book = cache.books_now()
    book.running = True
    for number, layer in enumerate(cache.layers):
        if held := len(book.streams[cache.names[number]]):
            book.update(layer.keys[:, :, :held], layer.values[:, :, :held], number)
    book.running = False
    return book


def validity(mask: Tensor | None, tokens: int) -> Tensor | None:
    """A 2-D mask [batch, tokens] of the one that `generate` makes for a static cache, [batch, 1, queries, positions].

    The last query sees all that is no padding; bool, or 0 where it sees. Other masks stay as they are.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return mask
    rows = mask[:, 0, -1, :tokens]
    return rows if rows.dtype == torch.bool else rows == 0


def lay(cache: Any, book: RoutedCache) -> None:
    """Make a static cache hold what a dynamic routed one holds after a call, in place; `book` loses its keys.

    A layer has room for as many positions more as the conversation has. Buffers that are long enough are used again,
    so that what was compiled with them stays true. InputError: the conversation is longer than the cache.
    """
    longest = static_cache.longest(cache)
    if book.length > longest:
        raise InputError(
            f"the static KV cache takes {longest} positions, and the conversation has {book.length}: make a larger one "
            "(max_cache_len; generate does by max_new_tokens)"
        )
    names, held = stream_names(book.schedule), compat.cache_layers(book)
    if not isinstance(cache, RoutedStaticCache):
        waiting = cache.__dict__.pop(_WAITING, None) or {"layers": [None] * len(names), "slots": {}, "names": names}
        cache.__dict__.update(waiting, stock_layers=cache.layers, stepping=False)
        cache.argument = compat.layer_cache_argument()
        cache.__class__ = RoutedStaticCache
    if cache.names != names:
        cache.layers, cache.slots, cache.names = [None] * len(names), {}, names
    example = held[-1].keys
    for name, positions in book.streams.items():
        slots = longest - book.length + len(positions)
        cache.slots[name] = _slots(cache.slots.get(name), positions.places, slots, example.device)
    for number, name in enumerate(names):
        layer = book.layers[number]
        keys, values = (part if isinstance(part, Tensor) else example[:, :, :0] for part in (layer.keys, layer.values))
        slots = cache.slots[name]
        before = cache.layers[number]
        if before is None or before.slots is not slots or not _same_kind(before.keys, keys):
            shape = (*keys.shape[:2], len(slots.number), keys.shape[3])
            buffers = keys.new_empty(shape), values.new_empty((*shape[:3], values.shape[3]))
            static_cache.fixed(*buffers)
            cache.layers[number] = StaticStreamLayer(*buffers, slots, longest)
        here = cache.layers[number]
        for buffer, new in ((here.keys, keys), (here.values, values)):
            buffer[:, :, : new.shape[2]] = new
            buffer[:, :, new.shape[2] :] = 0
        layer.keys = layer.values = None  # at once: the next layer's buffers can take their place
    cache.schedule, cache.book = book.schedule, book.without_keys()


def _same_kind(buffer: Tensor, new: Tensor) -> bool:
    same = buffer.dtype == new.dtype and buffer.device == new.device
    return same and buffer.shape[:2] == new.shape[:2] and buffer.shape[3] == new.shape[3]


def _slots(before: Slots | None, held: PositionSet, count: int, device: torch.device) -> Slots:
    """Slots for at least `count` positions, of which some are held."""
    batch = len(held.index)
    if before is None or before.valid.device != device or len(before.valid) != batch or len(before.number) < count:
        before = Slots(
            at=torch.zeros(1, dtype=torch.long, device=device),
            valid=torch.ones(batch, count, dtype=torch.bool, device=device),
            number=torch.arange(count, device=device),
        )
        static_cache.fixed(before.at, before.valid, before.number)
    before.at.fill_(len(held))
    before.valid.fill_(True)
    if held.valid is not None:
        before.valid[:, : len(held)] = held.valid.to(device)
    return before


def step(
    decoder: Any, cache: RoutedStaticCache, embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> BaseModelOutputWithPast:
    """One text token for every sample: [batch, 1, hidden] through all layers.

    `attention_mask` is [batch, positions] or what `generate` makes (`validity`): only what it says of the new token is
    read. `position_ids` are int64 [batch or 1, 1]; None: the place in the conversation.
    """
    full = cache.slots[FULL]
    if attention_mask is not None:
        rows = validity(attention_mask, attention_mask.shape[-1])
        assert rows is not None
        new = rows.bool().gather(1, full.at.expand(len(embeds), 1))
        for slots in cache.slots.values():
            slots.valid.index_copy_(1, slots.at, new)
    if position_ids is None:
        position_ids = full.at[None]
    additive = compat.attention_of(decoder.config) == "eager"
    masks = {name: slots.mask(embeds, additive) for name, slots in cache.slots.items()}
    rotary, hidden = decoder.rotary_emb(embeds, position_ids), embeds
    for layer, name in zip(decoder.layers, cache.names, strict=True):
        output = layer(
            hidden, attention_mask=masks[name], position_embeddings=rotary, position_ids=position_ids, use_cache=True,
            **{cache.argument: cache},
        )  # fmt: skip
        hidden = compat.layer_output(output)
    for slots in cache.slots.values():
        slots.at.add_(1)
    return BaseModelOutputWithPast(last_hidden_state=decoder.norm(hidden), past_key_values=cache)  # type: ignore[arg-type]
