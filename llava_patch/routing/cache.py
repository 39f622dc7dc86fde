"""A KV cache whose layers differ in length, and what later calls need to know of the conversation so far.

Layers below the split hold every position, text-only layers the text positions, pruned layers the survivors. Which
positions those are travels here, with the cache, never with the model: two generations may interleave, and beams
expand and reorder it with the keys and values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from llava_patch.core.errors import InputError
from llava_patch.hosts import compat
from llava_patch.hosts.compat.dynamic_cache import Base
from llava_patch.routing.plan import KeyPositions, PositionSet, passed
from llava_patch.routing.schedule import LayerMode, LayerSchedule

FULL, TEXT = "full", "text"


def kept_after(stage: int) -> str:
    """The name of the positions that pruning has left after a stage."""
    return f"kept {stage}"


@dataclass
class SideMemory:
    """The side branch's inputs so far: an image in a later turn attends to the earlier ones there.

    Inputs rather than keys and values, which take twice the memory; the branch runs over all of them again when an
    image arrives, and only then.
    """

    states: Tensor  # [batch, images so far, hidden]
    position_ids: Tensor  # int64 [batch, images so far]
    places: PositionSet  # where they are in the conversation

    def map(self, change: Callable[[Tensor], Tensor]) -> "SideMemory":
        """The same change of the batch dimension on every tensor, each [batch, ...]."""
        return SideMemory(change(self.states), change(self.position_ids), self.places.map(change))


class RoutedCache(Base):
    """DynamicCache of a routed conversation."""

    schedule: LayerSchedule  # what the model's layers do; a cache goes on under the same schedule only
    running: bool  # whether a routed call is under way; nothing else may add keys
    length: int  # positions seen so far, whether or not a layer holds them; what `get_seq_length()` returns
    image_end: int  # first position behind the last image
    # The positions that layers of each kind hold ("full": every one, `kept_after`: all but pruned, "text").
    streams: dict[str, KeyPositions]
    side: SideMemory | None  # what the side branch has seen, or None

    @classmethod
    def adopt(
        cls, cache: Any, schedule: LayerSchedule, valid: Tensor | None, batch: int, device: torch.device
    ) -> "RoutedCache":
        """Turn a DynamicCache that has seen no image into a routed one, in place.

        It is empty, as `generate` has made it, or filled by earlier turns of text alone; `valid` is bool [batch, tokens
        so far], False at padding (None: no padding). InputError: a sliding window has already dropped positions.
        """
        if isinstance(cache, cls):
            return cache
        length = cache.get_seq_length()
        # A windowed layer drops positions by its own length; ours differ in length, so the mask does the windowing.
        for number, layer in enumerate(compat.cache_layers(cache)):
            if layer.keys.shape[-2] != length:
                raise InputError(
                    f"layer {number} of the KV cache has dropped positions that lie outside its sliding window: an "
                    "image cannot join this conversation; start from an empty cache"
                )
        compat.keep_every_position(cache)
        cache.__class__ = cls
        routed: RoutedCache = cache
        routed.schedule, routed.running = schedule, False
        routed.length, routed.image_end, routed.side = length, 0, None
        so_far = PositionSet.run(0, length, batch, device, valid)
        names = [FULL, *map(kept_after, schedule.stages.values()), *[TEXT] * (LayerMode.TEXT in schedule.modes)]
        routed.streams = {name: KeyPositions(so_far) for name in names}
        return routed

    @classmethod
    def check(cls, cache: Any, schedule: LayerSchedule) -> None:
        """Refuse (InputError) a cache whose layers cannot differ in length, or that another schedule has filled."""
        if isinstance(cache, cls):
            cls.check_schedule(cache, schedule)
        if type(cache) is not DynamicCache and type(cache) is not cls:
            raise InputError(
                f"routing needs a dynamic KV cache, got {type(cache).__name__}: do not set cache_implementation, or "
                'set it to "dynamic"'
            )
        if getattr(cache, "offloading", False):
            raise InputError('routing needs a KV cache on the device: do not set cache_implementation = "offloaded"')

    @staticmethod
    def check_schedule(cache: Any, schedule: LayerSchedule) -> None:
        """Refuse (InputError) a routed cache that another schedule has filled."""
        if cache.schedule != schedule:
            raise InputError(
                "this KV cache was filled under other routing or pruning settings than the model has now: start from "
                "an empty cache"
            )

    def without_keys(self) -> "RoutedCache":
        """What is known of the conversation, in a cache of its own that holds no keys and values yet."""
        empty = object.__new__(type(self))
        empty.__dict__.update(self.__dict__, layers=[type(layer)() for layer in self.layers], running=False)
        empty.streams = {name: held.map(lambda x: x) for name, held in self.streams.items()}
        return empty

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add a layer's keys and values, each [batch, key_value_heads, new, head_dim], and give all that it holds.

        InputError: the caller is no routed model, which knows the positions.
        """
        if not self.running:
            raise InputError(
                "this KV cache was filled by a routed model, but the model that goes on with it is not routed (was the "
                "patch removed?): start from an empty cache"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def extend(self, stream: str, new: PositionSet | int) -> KeyPositions:
        """Note the positions (or how many come next) that this call adds to a kind of layer; gives what it holds."""
        held = self.streams[stream]
        if isinstance(new, int):
            held.add_run(new, self.length + new)
        else:
            held.add(new)
        return held

    def kept(self) -> Tensor:
        """Positions that pruning has left: bool [batch, length]; all valid ones where nothing is pruned.

        Of a pruning with several stages, int64 [batch, length]: how many of them each position has passed.
        """
        names = [kept_after(stage) for stage in self.schedule.stages.values()] or [FULL]
        return passed([self.streams[name].places.mask(self.length) for name in names])

    def remember_side(self, states: Tensor, position_ids: Tensor, places: PositionSet) -> SideMemory:
        """Note what the side branch sees in this call, shaped as in `SideMemory`; returns all that it has seen."""
        if self.side is not None:
            states = torch.cat([self.side.states, states], dim=1)
            position_ids = torch.cat([self.side.position_ids, position_ids], dim=1)
            places = self.side.places.joined(places)
        self.side = SideMemory(states, position_ids, places)
        return self.side

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Positions that a layer holds; without an argument, positions of the conversation."""
        return self.length if layer_idx is None else super().get_seq_length(layer_idx)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder samples (beam search); `beam_idx` is int64 [batch]."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.rearrange(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sample (several return sequences)."""
        super().batch_repeat_interleave(repeats)
        self.rearrange(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples; `indices` is int64 [samples to keep]."""
        super().batch_select_indices(indices)
        self.rearrange(lambda x: x[indices.to(x.device)])

    def rearrange(self, change: Callable[[Tensor], Tensor]) -> None:
        """The same change of the batch dimension on all that is known of the positions, each tensor [batch, ...]."""
        self.streams = {name: places.map(change) for name, places in self.streams.items()}
        if self.side is not None:
            self.side = self.side.map(change)

    def crop(self, max_length: int) -> None:
        """Forget the latest positions (assisted decoding), as far as they are text: InputError where an image is cut.

        `max_length` are the positions to keep; negative: positions to forget.
        """
        forget = compat.to_forget(max_length, self.length)
        keep = self.length - forget
        if not forget:
            return
        if keep < self.image_end:
            raise InputError(
                f"a routed KV cache cannot be cropped to {keep} positions: its last image ends at {self.image_end}"
            )
        for layer in compat.cache_layers(self):
            layer.crop(-forget)
        for held in self.streams.values():
            held.forget(forget)
        self.length = keep

    def nbytes(self) -> int:
        """Bytes held: keys and values of every layer, and what the side branch remembers."""
        return cache_bytes(self) + (0 if self.side is None else self.side.states.nbytes + self.side.position_ids.nbytes)


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values of any transformers cache."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in compat.cache_layers(compat.as_cache(cache)))
