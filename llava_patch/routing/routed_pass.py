"""One call of a routed decoder: the layers in order, each on the positions that its mode says.

Source: "Late-Layer Fusion is Enough" (DPVR), section 3.2. Layers below the split run on all positions, the side branch
on the image positions, the deep layers as the variant has it (`schedule`); pruned tokens leave on the way (`pruning`).
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from llava_patch.fusion import deep_stack_decoder
from llava_patch.hosts import call_context, compat, projections, zero
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.hosts.call_context import CallContext
from llava_patch.routing import side_branch
from llava_patch.routing.cache import FULL, TEXT, RoutedCache, kept_after
from llava_patch.routing.layers import Stream, attention_of, call_with_keys, observer, prime, trains
from llava_patch.routing.plan import (
    Counts,
    KeyPositions,
    PositionSet,
    RoutingPlan,
    make_plan,
    passed,
    positions,
    put_back,
)
from llava_patch.routing.pruning import Seen, choose_kept
from llava_patch.routing.schedule import LayerMode, LayerSchedule


@dataclass(kw_only=True)
class Call(CallContext):
    """A call of the decoder: the context with masks that fit its tokens, and what else the call brings."""

    embeds: Tensor  # [batch, tokens, hidden]
    attention_mask: Tensor | None  # [batch, earlier and new tokens] or None
    seen: int  # tokens before this call
    use_cache: bool = False  # whether a cache is returned
    recording: bool = False  # whether the caller wants hidden states
    valid: Tensor | None = None  # bool [batch, tokens], False at padding; None: no padding
    counts: Counts | None = None  # of the image mask; None when the call brings no image
    protected: Tensor | None = None  # bool [batch, tokens], positions that pruning must leave in
    # Whether the side branch runs on nothing, so that a batch without an image keeps the modules' order.
    in_order: bool = False
    cache: RoutedCache | None = None  # the conversation's cache, or None
    cache_position: Tensor = field(init=False, repr=False)  # int64 [tokens]
    position_ids: Tensor = field(init=False, repr=False)  # int64 [batch or 1, tokens]

    @property
    def queries(self) -> int:
        """New tokens of a sample, padding included."""
        return self.embeds.shape[1]

    @property
    def reads_only_suffix(self) -> bool:
        """Whether the caller looks at the last `suffix` positions alone, none of them padding."""
        return self.suffix is not None and not self.recording and (self.counts is None or self.counts.suffix_valid)

    def last_index(self) -> Tensor:
        """The column of each sample's last prompt token: int64 [batch]."""
        if self.valid is None:
            return torch.full((len(self.embeds),), self.queries - 1 - self.ahead, device=self.embeds.device)
        return (self.valid * torch.arange(self.queries, device=self.valid.device)).argmax(1) - self.ahead


class RoutedPass:
    """The layers of one call. Only `forward` is meant to be called, once.

    The states between two layers are in `merged` (every position that is left, in order), or apart in `image` and
    `text`, or in both. `plan` leads from one to the other; it is None below the split and in a call without an image,
    where `merged` and `text` are the same.
    """

    def __init__(self, anatomy: Anatomy, schedule: LayerSchedule, call: Call) -> None:
        self.anatomy = anatomy
        self.decoder = anatomy.decoder
        self.layers: list[Any] = list(self.decoder.layers)
        self.last = len(self.layers) - 1
        self.schedule = schedule
        self.call = call
        self.config = self.decoder.config
        pruning = schedule.pruning
        prunes = pruning is not None and (pruning.training or not self.decoder.training)
        self.stages = schedule.stages if prunes else {}  # layers before which pruning drops something
        reads = pruning is not None and pruning.USES_ATTENTION and not pruning.READS_NEXT
        # Layers whose attention says what is dropped before the next one.
        self.read = {layer - 1 for layer in self.stages} if reads else set()
        window = compat.sliding_window(self.config)
        self.windowed = window is not None and call.seen + call.queries > window
        self.observer = observer()
        self.recorded: list[Tensor] | None = [] if call.recording else None
        # Whether layers may run in a row: nobody looks on, and no layer has a graph, or what would become one.
        self.quick = (
            self.observer is None and self.recorded is None and not call.in_order and not self.decoder.training
            and not torch.is_grad_enabled() and compat.run_in_a_row(self.layers)
        )  # fmt: skip
        self.image_mask, self.counts = call.image_mask, call.counts
        self.plan: RoutingPlan | None = None
        self.main: PositionSet | None = None  # what pruning left, as columns of this call; None: all
        self.merged: Tensor | None = None
        self.text: Tensor | None = None
        self.image: Tensor | None = None
        self.side: Tensor | None = None  # the side branch's output, which `image` is until a layer changes it
        self.zero: Tensor | None = None  # joins where a batch with an image first reads the side branch
        self.entered: Tensor | None = None  # what the layer whose attention is read got
        self.attention: Tensor | None = None  # of the raters there, where it was taken on the way
        self.raters: PositionSet | None = None  # whose attention counts, as columns of this call
        self.left: list[Tensor] = []  # without a cache: bool [batch, tokens], what each stage of pruning has left
        self.left_with: Tensor | None = None  # states that pruned positions left with
        self.text_mask: Tensor | None = None  # of a layer that text asks and whose keys are all that is left

    def forward(self) -> BaseModelOutputWithPast:
        """Run all layers.

        `last_hidden_state` is [batch, tokens, hidden] after the final norm, of the last `suffix` positions alone where
        no others are read; `hidden_states`, where they are recorded, are NaN at positions that a layer has none for.
        """
        cache = self.call.cache
        if cache is None:
            return self._forward()
        cache.running = True
        try:
            return self._forward()
        finally:
            cache.running = False

    def _forward(self) -> BaseModelOutputWithPast:
        call, split, end = self.call, self.schedule.split, len(self.layers)
        keep_graph = self._graph_below_split()
        with torch.set_grad_enabled(keep_graph):
            self._open(call.embeds if keep_graph else call.embeds.detach())
            self._layers(0, split)
            if split in self.stages:
                self._prune(split)
        if split < end:
            self._part_streams()
            self._layers(split, end)
        hidden = self._whole(end)
        if self.zero is not None:
            hidden = hidden + self.zero
        if self.left_with is not None and self.main is not None:
            hidden = put_back(self.left_with, self.main, hidden)
        hidden = self.decoder.norm(hidden)
        if call.cache is not None:
            call.cache.length += call.queries
            if call.counts is not None:
                call.cache.image_end = call.seen + call.counts.image_end
        if self.recorded is not None:
            self.recorded[-1] = hidden  # as in the stock decoder, the last entry is after the final norm
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,  # type: ignore[arg-type]
            past_key_values=call.cache if call.use_cache else None,  # type: ignore[arg-type]
            hidden_states=None if self.recorded is None else tuple(self.recorded),  # type: ignore[arg-type]
        )

    # --- layers -------------------------------------------------------------------------------------------------------

    def _layers(self, begin: int, end: int) -> None:
        """Run some layers in order: those in a row that ask for nothing in between without what each alone needs."""
        number = begin
        while number < end:
            stop = self._alike_until(number, end)
            if stop == number:
                self._layer(number)
                number += 1
                continue
            apart = self.plan is not None  # then these are layers of text alone
            states = self._text() if apart else self._whole(number)
            stream = self.text_stream if self.schedule.modes[number] is LayerMode.TEXT else self.main_stream
            states = compat.call_layers(
                self.layers[number:stop], states, cache=self.call.cache, attention_mask=stream.mask,
                position_ids=stream.position_ids, position_embeddings=stream.rotary, use_cache=self.call.use_cache,
            )  # fmt: skip
            self.text, self.merged = (states, None) if apart else (None, states)
            number = stop

    def _alike_until(self, number: int, end: int) -> int:
        """The end of a run of layers that begins here, all of one stream; `number` itself where there is none."""
        if not self.quick or self.zero is not None:
            return number
        text = self.schedule.modes[number] is LayerMode.TEXT
        if self.plan is not None and not (text and self._text().shape[1]):
            return number
        stop = number
        while stop < end and not self._is_special(stop) and (self.schedule.modes[stop] is LayerMode.TEXT) == text:
            stop += 1
        return stop

    def _is_special(self, number: int) -> bool:
        """Whether something is done before, in or after this layer alone."""
        if number == self.last or number in self.stages or number in self.read:
            return True
        return self.call.stacked is not None and number in self.schedule.injections

    def _layer(self, number: int) -> None:
        mode = self.schedule.modes[number]
        if number in self.stages and number != self.schedule.split:  # at the split it has been done
            self._prune(number)
        if self.call.stacked is not None and number in self.schedule.injections:
            self._inject(number)
        if number not in self.read:
            self._run(number, mode)
            return
        self.entered = self._whole(number)
        with self._scores_taken_inside(number):
            self._run(number, mode)

    def _run(self, number: int, mode: LayerMode) -> None:
        """A layer on what its mode says."""
        if mode is LayerMode.TEXT:
            self._text_layer(number)
        elif self._image_gives_keys_only(number, mode):
            self._keys_layer(number)
        elif self.call.in_order and number in self.schedule.keys:
            self.text = self._without_image(number, self._text())
            self._record(self.text, self.main)
        else:
            self._whole_layer(number, mode)

    def _whole_layer(self, number: int, mode: LayerMode) -> None:
        """All positions: stock, late fusion, and PC, after which the side branch's output takes the image's place."""
        whole = self._whole(number)
        if self.zero is not None:
            whole, self.zero = whole + self.zero, None
        if number == self.last and self._last_token_only(whole):
            self._finish(number, whole, self.main_stream)
            return
        self.merged, self.text = self._call_layer(number, whole, self.main_stream), None
        self._record(self.merged, self.main)
        if mode is LayerMode.RESET and self.plan is not None and number != self.last:
            self.text, self.merged = self.plan.text.take(self.merged), None

    def _text_layer(self, number: int) -> None:
        """Text positions alone: the image's are absent, not masked."""
        text = self._text()
        if text.shape[1]:  # a prompt may be nothing but an image
            if number == self.last and self._last_token_only(text, all_text=True):
                self._finish(number, text, self.text_stream)
                return
            self.text = self._call_layer(number, text, self.text_stream)
        self._record(self._text(), None if self.plan is None else self._columns(self.plan.text))

    def _keys_layer(self, number: int) -> None:
        """Text asks, image positions give keys and values by the layer's own norm and projections."""
        plan, layer, cache = self.plan, self.layers[number], self.call.cache
        assert plan is not None
        text, image = self._text(), self._image(number)
        image_rotary = self._columns(plan.image).take_rotary(self.rotary)
        if not text.shape[1]:
            if cache is not None:
                cache.update(*projections.keys_values(layer, image, image_rotary), layer.self_attn.layer_idx)
        elif not image.shape[1]:
            self.text = self._without_image(number, text)
        else:
            self._tell(number, self.text_stream, self.main_stream)
            if self.text_mask is None:
                self.text_mask = self.main_stream.mask_among(self.text_stream.last(self.text_stream.count))
            self.text = call_with_keys(
                layer, text, image, rotary=self.text_stream.rotary, others_rotary=image_rotary, merge=plan.merge_heads,
                attention_mask=self.text_mask, cache=cache,
            )  # fmt: skip
        self._record(self._text(), self._columns(plan.text))

    def _without_image(self, number: int, text: Tensor) -> Tensor:
        """A KV layer where no image is left: the keys of no position come first, so that gradients keep their order."""
        self._tell(number, self.main_stream, self.main_stream)
        layer, (cos, sin) = self.layers[number], self.main_stream.rotary
        return call_with_keys(
            layer, text, text[:, :0], rotary=(cos, sin), others_rotary=(cos[:, :0], sin[:, :0]), merge=_before,
            attention_mask=self.main_stream.mask(layer), cache=self.call.cache,
        )  # fmt: skip

    def _image_gives_keys_only(self, number: int, mode: LayerMode) -> bool:
        """Whether nobody uses what a layer would make of the image positions; the last layer's are the output."""
        if self.plan is None or number == self.last:
            return False
        if mode is not LayerMode.FUSE:
            return mode is LayerMode.KEYS
        return (
            number == self.schedule.late_fusion[-1]
            and self._last_token_only(self._text(), all_text=True)
            # The masks of flash attention cannot say this.
            and not compat.backend_of(self.layers[number].self_attn).startswith("flash_attention")
        )

    def _last_token_only(self, hidden: Tensor, all_text: bool = False) -> bool:
        """Whether the last layer need only answer at the last positions, `all_text`: that are text in every sample."""
        call = self.call
        if not call.reads_only_suffix or call.suffix is None or not self.schedule.leaves_out:
            return False
        if self.decoder.training and trains([self.layers[self.last]]):  # ranks differ here, and so would their order
            return False
        return call.suffix < hidden.shape[1] and (not all_text or call.counts is None or call.counts.suffix_text)

    def _finish(self, number: int, hidden: Tensor, stream: Stream) -> None:
        """Run the last layer where only the last positions are read: the others give keys and values."""
        last = self.call.suffix
        assert last is not None
        self._tell(number, stream, stream, last)
        layer, cut = self.layers[number], hidden.shape[1] - last
        cos, sin = stream.rotary
        self.merged = call_with_keys(
            layer, hidden[:, cut:], hidden[:, :cut], rotary=(cos[:, cut:], sin[:, cut:]),
            others_rotary=(cos[:, :cut], sin[:, :cut]), merge=_before,
            attention_mask=stream.mask(layer, last), cache=self.call.cache,
        )  # fmt: skip
        self.text, self.plan = None, None

    def _call_layer(self, number: int, hidden: Tensor, stream: Stream) -> Tensor:
        if self.observer is not None:
            self._tell(number, stream, stream)
        layer = self.layers[number]
        hidden = prime(hidden, layer)
        return compat.call_layer(
            layer, hidden, attention_mask=stream.mask(layer), position_ids=stream.position_ids,
            position_embeddings=stream.rotary, cache=self.call.cache, use_cache=self.call.use_cache,
            checkpoint=hidden.requires_grad,
        )  # fmt: skip

    def _tell(self, number: int, asking: Stream, giving: Stream, last: int | None = None) -> None:
        if self.observer is not None:
            queries = asking.last(asking.count if last is None else last)
            self.observer.layer(number, queries.index, giving.keys.places.index)

    def _inject(self, number: int) -> None:
        """Add the taps that DeepStack has for this layer, which lies below the split."""
        stacked, hidden = self.call.stacked, self._whole(number)
        assert stacked is not None
        rows = stacked.rows
        if self.main is not None:
            rows = rows.gather(1, self.main.index)
            if self.main.valid is not None:
                rows = rows * self.main.valid
        features = stacked.features[self.schedule.injections.index(number)]
        self.merged, self.text = deep_stack_decoder.add(hidden, features, rows), None

    # --- states -------------------------------------------------------------------------------------------------------

    def _whole(self, number: int) -> Tensor:
        """Every position's state, in order, as layer `number` reads it (L: the decoder's end)."""
        if self.merged is None:
            assert self.text is not None
            self.merged = self.text if self.plan is None else self.plan.merge(self._image(number), self.text)
        return self.merged

    def _text(self) -> Tensor:
        """The text's states; from here on they stand apart from the image's."""
        if self.text is None:
            assert self.merged is not None
            self.text = self.merged
            if self.plan is not None:
                self.text, self.image = self.plan.text.take(self.merged), self.plan.image.take(self.merged)
        self.merged = None
        return self.text

    def _image(self, number: int) -> Tensor:
        assert self.image is not None
        if self.observer is None or self.image is not self.side:
            return self.image
        return self.observer.side_input(self.image, number)

    def _record(self, states: Tensor, columns: PositionSet | None) -> None:
        """Note a layer's output at some columns of this call (None: all) for output_hidden_states."""
        if self.recorded is None:
            return
        if columns is not None:
            absent = states.new_full((len(states), self.call.queries, states.shape[2]), float("nan"))
            states = put_back(absent, columns, states)
        self.recorded.append(states)

    # --- the beginning, the split, the pruning ------------------------------------------------------------------------

    def _open(self, hidden: Tensor) -> None:
        """Make the stream of all positions, with the stock model's own mask."""
        call = self.call
        self.rotary = compat.rotary(self.decoder, hidden, call.position_ids)
        self.full = self._stream(FULL, None, hidden)
        self.full.position_ids = call.position_ids
        self.full.masks[(compat.attention_of(self.config), None)] = compat.stock_mask(
            self.config, hidden, attention_mask=call.attention_mask, seen=None if call.cache is None else call.seen,
            cache_position=call.cache_position, position_ids=call.position_ids,
        )  # fmt: skip
        self.main_stream = self.text_stream = self.full
        self.merged = hidden
        self._record(hidden, None)

    def _part_streams(self) -> None:
        """Take image and text apart and run the side branch."""
        hidden = self._whole(self.schedule.split)
        text_name = TEXT if LayerMode.TEXT in self.schedule.modes else None  # else no layer's keys are the text's own
        if self.image_mask is None:
            if self.call.in_order:
                self.zero = side_branch.zero_gradient_pass(self.anatomy, hidden, self.rotary)
            if text_name is not None:
                self.text_stream = self._stream(text_name, None, hidden)
            return
        valid = self.call.valid if self.main is None else self.main.valid
        self.plan = make_plan(self.image_mask, valid, self.counts)
        self.text_stream = self._stream(text_name, self._columns(self.plan.text), hidden)
        self._text()
        assert self.image is not None
        if self.schedule.side_layers and not self.image.shape[1]:  # pruning left the branch nothing
            if side_branch.keeps_order(self.anatomy, ()):
                self.zero = side_branch.zero_gradient_pass(self.anatomy, hidden, self.rotary)
        elif self.schedule.side_layers:
            self.image = self._side_branch(self.image, self._columns(self.plan.image))
            if self.observer is not None:
                self.image = self.observer.side_output(self.image)
            self.side = self.image

    def _side_branch(self, states: Tensor, columns: PositionSet) -> Tensor:
        """The side branch at some columns of this call, which attend to the conversation's earlier images too."""
        call, places, new = self.call, columns.shifted(self.call.seen), states.shape[1]
        rotary = columns.take_rotary(self.rotary)
        if call.cache is not None:
            ids = columns.take(call.position_ids[:, :, None])[:, :, 0]
            memory = call.cache.remember_side(states, ids, places)
            if memory.states.shape[1] > new:
                states, places = memory.states, memory.places
                rotary = compat.rotary(self.decoder, states, memory.position_ids)
        stream = Stream(self.config, rotary, len(places), KeyPositions(places), states, self.windowed)
        return side_branch.run(self.anatomy, states, stream)[:, -new:]

    def _prune(self, number: int) -> None:
        """Drop what a stage of pruning does not keep, before layer `number`."""
        was_side, self.side = self.image is self.side, None  # pruning is no layer that reads it
        hidden, self.text, self.text_mask = self._whole(number), None, None
        name = kept_after(self.stages[number])
        if self.image_mask is None or self.counts is None:  # nothing to prune, but the layers' keys are their own
            self.main_stream = self._stream(name, None, hidden)
            return
        kept, before = self._choose(number, hidden), self.main
        chosen = positions(kept, tuple(a + b for a, b in zip(self.counts.image, self.counts.text, strict=True)))
        if not self.call.reads_only_suffix:
            self.left_with = (
                hidden if self.left_with is None or before is None else put_back(self.left_with, before, hidden)
            )
        self.main = self._columns(chosen)
        self.image_mask = self.image_mask.gather(1, chosen.index)
        if chosen.valid is not None:
            self.image_mask = self.image_mask & chosen.valid
        self.main_stream = self._stream(name, self.main, hidden)
        self.merged = chosen.take(hidden)
        if self.plan is not None:  # the text positions, and so the text stream, stay as they are
            self.plan = make_plan(self.image_mask, chosen.valid, self.counts)
            self._text()
            self.side = self.image if was_side else None
        if self.call.cache is None and self.call.kept is None:  # with a cache the prompt does not come again
            self.left.append(self.main.mask(self.call.queries))
            if len(self.left) == len(self.stages):
                call_context.remember_chosen(self.anatomy, self.call.embeds, passed(self.left))

    def _choose(self, number: int, hidden: Tensor) -> Tensor:
        """What of the main positions goes on to layer `number`: bool [batch, positions]; chosen before, or now."""
        call, image_mask, pruning, stage = self.call, self.image_mask, self.schedule.pruning, self.stages[number]
        assert image_mask is not None and call.counts is not None and pruning is not None and self.counts is not None
        valid = call.valid if self.main is None else self.main.valid
        protected = None if call.protected is None else self._at_main(call.protected)
        if call.kept is not None:
            kept = self._at_main(call.kept) > stage
            kept = kept if protected is None else kept | protected
            kept = kept if valid is None else kept & valid
            # Of the columns that are left, which the host's masks are not.
            self.counts = replace(Counts.of(image_mask & kept, kept), masks=None)
            return kept
        keep = pruning.keep_counts(stage, call.counts.image, call.counts.protected)
        scores = pruning.scores(Seen(image_mask, functools.partial(self._attention, number, hidden)))
        kept = ~image_mask | choose_kept(scores, image_mask, keep, protected)
        kept = kept if valid is None else kept & valid
        self.entered, self.attention, self.counts = None, None, replace(self.counts, image=keep, masks=None)
        return kept

    def _at_main(self, mask: Tensor) -> Tensor:
        """A mask [batch, tokens] of this call at the main positions; what it says at their padding is not meant."""
        return mask if self.main is None else mask.gather(1, self.main.index)

    def _attention(self, number: int, hidden: Tensor) -> Tensor:
        """Attention of the raters that says what is dropped before layer `number`: float32 [batch, main positions].

        `hidden` [batch, main positions, hidden] is that layer's input.
        """
        if self.attention is not None:
            return self.attention
        call, pruning, columns, stream = self.call, self.schedule.pruning, self._raters(), self.main_stream
        assert pruning is not None
        ahead = pruning.READS_NEXT
        read, states = (number, hidden) if ahead else (number - 1, self.entered)
        assert states is not None
        keys, held = stream.keys.places, None
        if ahead:
            new = (
                PositionSet.run(0, call.queries, len(hidden), hidden.device, call.valid)
                if self.main is None
                else self.main
            )
            keys = new.shifted(call.seen)
        if call.cache is not None:
            layers = call.cache.layers
            if read < len(layers) and isinstance(layers[read].keys, Tensor):
                held = layers[read].keys
                if ahead:
                    apart = self.schedule.modes[number] is LayerMode.TEXT  # which holds no image of an earlier turn
                    name = TEXT if apart else kept_after(self.stages[number])
                    keys = call.cache.streams[name].places.joined(keys)
        allowed = compat.visible(self.config, columns.index + call.seen, keys.index, keys.valid)
        rows = replace(columns, index=self._rows(columns.index))
        return attention_of(self.layers[read], states, rows, stream.rotary, held, allowed, ahead=ahead)

    def _raters(self) -> PositionSet:
        """Whose attention counts, as columns of this call: those that the pruning names, or the last prompt token."""
        if self.raters is not None:
            return self.raters
        call, pruning, last = self.call, self.schedule.pruning, self.call.last_index()[:, None]
        assert pruning is not None
        if not pruning.MANY_RATERS or call.image_mask is None:
            self.raters = PositionSet(last, None)
            return self.raters
        columns = torch.arange(call.queries, device=last.device)[None]
        text_mask = ~call.image_mask & (columns <= last)
        text_mask = text_mask if call.valid is None else text_mask & call.valid
        mask = pruning.raters(call.embeds, call.image_mask, text_mask)
        mask = mask | ((columns == last) & ~mask.any(1, keepdim=True))
        self.raters = positions(mask, tuple(mask.sum(1).tolist()))
        return self.raters

    def _rows(self, columns: Tensor) -> Tensor:
        """Rows of columns of this call among the main positions, int64 [batch, n]; of one that left, that before it."""
        if self.main is None:
            return columns
        there = self.main.mask(self.call.queries).cumsum(1)
        padding = len(self.main) - there[:, -1:]
        return (there.gather(1, columns) - 1 + padding).clamp(min=0)

    @contextlib.contextmanager
    def _scores_taken_inside(self, number: int) -> Iterator[None]:
        """Take `_attention` while the layer runs, where its weights are in parts at any other time; image or not."""
        attention, pruning = zero.bare(self.layers[number].self_attn), self.schedule.pruning
        if pruning is None or not pruning.USES_ATTENTION or not zero.is_partitioned(attention.parameters()):
            yield
            return

        def take(*_: Any) -> None:
            hook.remove()  # checkpointing runs the layer again
            assert self.entered is not None
            self.attention = None  # an earlier stage's, on a rank without an image
            self.attention = self._attention(number + 1, self.entered)

        hook = attention.register_forward_hook(take)
        try:
            yield
        finally:
            hook.remove()

    # --- positions ----------------------------------------------------------------------------------------------------

    def _stream(self, name: str | None, columns: PositionSet | None, hidden: Tensor) -> Stream:
        """A stream of some columns of this call (None: of all); without a name no layer's keys are its own."""
        call, rotary = self.call, self.rotary if columns is None else columns.take_rotary(self.rotary)
        if columns is None and (call.valid is not None or call.cache is None or name is None):
            columns = PositionSet.run(0, call.queries, len(hidden), hidden.device, call.valid)
        new = call.queries if columns is None else columns.shifted(call.seen)
        if call.cache is not None and name is not None:
            keys = call.cache.extend(name, new)
        else:
            assert isinstance(new, PositionSet)
            keys = KeyPositions(new)
        return Stream(self.config, rotary, new if isinstance(new, int) else len(new), keys, hidden, self.windowed)

    def _columns(self, part: PositionSet) -> PositionSet:
        """Places among the main positions, as columns of this call."""
        return part if self.main is None else replace(part, index=self.main.index.gather(1, part.index))

    def _graph_below_split(self) -> bool:
        """Whether anything below the split, or before the decoder, wants a gradient."""
        if not torch.is_grad_enabled():
            return False
        a, split = self.anatomy, self.schedule.split
        if split == len(self.layers):
            return True
        above = [*self.layers[split:], a.norm, getattr(self.decoder, side_branch.SIDE_BRANCH, nn.Module())]
        known = {id(p) for module in above for p in module.parameters()}
        head = {id(p) for p in a.lm_head.parameters()} - {id(p) for p in a.embed_tokens.parameters()}
        if any(p.requires_grad and id(p) not in known and id(p) not in head for p in a.model.parameters()):
            return True
        if self.call.embeds.is_leaf:
            return self.call.embeds.requires_grad
        # Embeddings may require a gradient only because gradient checkpointing asked for it: nobody reads that one.
        return self.call.embeds.requires_grad and not compat.input_grads_are_forced(a.model, a.wrapper, a.decoder)


def _before(others: Tensor, own: Tensor) -> Tensor:
    """Heads of other positions in front of a layer's own: [batch, heads, positions, head_dim]."""
    if not others.shape[2]:
        # A copy would have another layout than the layer's own view, by which kernels of some CPUs round otherwise. The
        # sum of nothing brings `others` its gradient of zero.
        return own + others.sum().to(own.dtype) if others.requires_grad else own
    return torch.cat([others, own], dim=2)
