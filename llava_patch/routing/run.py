"""One call of a routed decoder: the layers in order, each on the positions that it sees.

Phases (DPVR paper, section 3.2): layers below the split on all positions; the side branch on image positions; the deep
layers as the variant has it. Pruned tokens leave on the way.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from llava_patch.fusion import stack
from llava_patch.hosts import call_context as carry
from llava_patch.hosts import compat, projections
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.routing import feed, side_branch, watch
from llava_patch.routing.autograd import prime
from llava_patch.routing.cache import FULL, KEPT, RoutedCache
from llava_patch.routing.deep import DeepLayers
from llava_patch.routing.plan import Counts, Held, PositionSet, count, positions, put_back
from llava_patch.routing.prune import choose, keep_counts
from llava_patch.routing.schedule import Program
from llava_patch.routing.streams import Stream


@dataclass
class Call:
    """What one call brings.

    Attributes:
        embeds: [batch, tokens, hidden].
        attention_mask: [batch, earlier and new tokens] or None.
        seen: tokens before this call.
        use_cache: whether a cache is returned.
        recording: whether the caller wants hidden states.
        valid: bool [batch, tokens], False at padding; None: no padding.
        image_mask: bool [batch, tokens]; None when the call brings no image.
        counts: of the image mask; None likewise.
        protected: bool [batch, tokens], positions that pruning must leave in.
        kept: bool [batch, tokens], an earlier pruning decision to repeat.
        suffix: how many of the last positions are read; None: any may be.
        ahead: how many of the last tokens are guesses behind the prompt.
        idle: whether the side branch runs on nothing, so that a batch without an image keeps the modules' order.
        stacked: what DeepStack adds at the image positions, or None.
        cache: the conversation's cache, or None.
        cache_position: int64 [tokens].
        position_ids: int64 [batch or 1, tokens].
    """

    embeds: Tensor
    attention_mask: Tensor | None
    seen: int
    use_cache: bool = False
    recording: bool = False
    valid: Tensor | None = None
    image_mask: Tensor | None = None
    counts: Counts | None = None
    protected: Tensor | None = None
    kept: Tensor | None = None
    suffix: int | None = None
    ahead: int = 0
    idle: bool = False
    stacked: carry.Stacked | None = None
    cache: RoutedCache | None = None
    cache_position: Tensor = field(default_factory=lambda: torch.empty(0))
    position_ids: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def queries(self) -> int:
        """New tokens of a sample, padding included."""
        return self.embeds.shape[1]

    def last_index(self) -> Tensor:
        """The column of each sample's last prompt token: int64 [batch]."""
        if self.valid is None:
            return torch.full((len(self.embeds),), self.queries - 1 - self.ahead, device=self.embeds.device)
        return (self.valid * torch.arange(self.queries, device=self.valid.device)).argmax(1) - self.ahead


class Run:
    """The layers of one call. Only `forward` is meant to be called, once."""

    def __init__(self, anatomy: Anatomy, program: Program, call: Call) -> None:
        """Prepare the stream of all positions."""
        self.anatomy = anatomy
        self.decoder = anatomy.decoder
        self.layers: list[Any] = list(anatomy.layers)
        self.program = program
        self.call = call
        self.config = self.decoder.config
        self.backend = compat.attention_of(self.config)
        prunes = program.prune_at is not None and (program.prune_in_training or not self.decoder.training)
        self.prune_at = program.prune_at if prunes else None
        window = compat.sliding_window(self.config)
        self.windowed = window is not None and call.seen + call.queries > window
        self.main: PositionSet | None = None  # what pruning left, as columns of this call; None: all
        self.base: Tensor | None = None  # states that pruned positions left with
        self.image_mask, self.counts = call.image_mask, call.counts
        self._text_rows: dict[tuple[int, int], Tensor] = {}
        self.recorded: list[Tensor] | None = [] if call.recording else None

    def forward(self) -> BaseModelOutputWithPast:
        """Run all layers."""
        cache = self.call.cache
        if cache is None:
            return self._forward()
        cache.running = True
        try:
            return self._forward()
        finally:
            cache.running = False

    def _forward(self) -> BaseModelOutputWithPast:
        call = self.call
        keep_graph = self._graph_below_split()
        with torch.set_grad_enabled(keep_graph):
            hidden = call.embeds if keep_graph else call.embeds.detach()
            self._open_main(hidden)
            self.record(hidden, None)
            hidden = self._stock_layers(hidden)
        if self.program.split < len(self.layers):
            hidden = DeepLayers(self, hidden).forward()
        if self.base is not None and self.main is not None:
            hidden = put_back(self.base, self.main, hidden)
        hidden = self.decoder.norm(hidden)
        if self.counts is not None and max(self.counts.image) == 0 and side_branch.wants_gradient(self.anatomy):
            hidden = hidden + side_branch.idle(self.anatomy, hidden)  # pruning left the side branch nothing
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

    # --- streams ------------------------------------------------------------------------------------------------------

    def _open_main(self, hidden: Tensor) -> None:
        call = self.call
        rotary = self.decoder.rotary_emb(hidden, call.position_ids)
        self.full = self._stream(FULL, None, rotary, hidden)
        self.full.position_ids = call.position_ids
        stock = compat.stock_mask(
            self.decoder, hidden, call.attention_mask, call.cache_position, call.cache, call.position_ids
        )
        self.full.set_mask(self.backend, stock)
        self.main_stream = self.text_stream = self.full

    def _stream(
        self, name: str | None, columns: PositionSet | None, rotary: tuple[Tensor, Tensor], hidden: Tensor
    ) -> Stream:
        call = self.call
        if columns is None and (call.valid is not None or call.cache is None or name is None):
            columns = PositionSet.run(0, call.queries, len(hidden), hidden.device, call.valid)
        new = call.queries if columns is None else columns.shifted(call.seen)
        if call.cache is not None and name is not None:
            keys = call.cache.extend(name, new)
        else:
            assert isinstance(new, PositionSet)
            keys = Held(new)
        count = new if isinstance(new, int) else len(new)
        return Stream(self.config, rotary, count, keys, hidden, self.windowed)

    def substream(self, name: str | None, columns: PositionSet | None, hidden: Tensor) -> Stream:
        """A stream of some columns of this call (None: of all); without a name no layer's keys are its own."""
        if columns is None:
            return self._stream(name, None, self.full.rotary, hidden)
        return self._stream(name, columns, columns.take_rotary(self.full.rotary), hidden)

    def columns(self, part: PositionSet) -> PositionSet:
        """Places among the main positions, as columns of this call."""
        return part if self.main is None else part.of(self.main)

    # --- below the split ----------------------------------------------------------------------------------------------

    def _stock_layers(self, hidden: Tensor) -> Tensor:
        before = hidden
        for number in range(self.program.split):
            if number == self.prune_at:
                hidden = self.prune(before, hidden)
            hidden = before = self._inject(number, hidden)
            hidden = self._whole_or_suffix(number, hidden)
            self.record(hidden, self.main)
        if self.program.split == self.prune_at:
            hidden = self.prune(before, hidden)
        return hidden

    def _inject(self, number: int, hidden: Tensor) -> Tensor:
        """Add the taps that DeepStack has for this layer."""
        stacked = self.call.stacked
        if stacked is None or number not in self.program.injections:
            return hidden
        rows = stacked.rows
        if self.main is not None:
            rows = rows.gather(1, self.main.index)
            if self.main.valid is not None:
                rows = rows * self.main.valid
        return stack.add(hidden, stacked.features[self.program.injections.index(number)], rows)

    def _graph_below_split(self) -> bool:
        if not torch.is_grad_enabled():
            return False
        a, split = self.anatomy, self.program.split
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

    # --- pruning ------------------------------------------------------------------------------------------------------

    def prune(self, before: Tensor, hidden: Tensor) -> Tensor:
        """Drop what FastV does not keep.

        Args:
            before: the previous layer's input, [batch, tokens, hidden].
            hidden: its output.
        """
        call = self.call
        if self.image_mask is None or self.counts is None:  # nothing to prune, but the layers' keys are their own
            self.main_stream = self.substream(KEPT, None, hidden)
            return hidden
        valid = torch.ones_like(self.image_mask) if call.valid is None else call.valid
        if call.kept is not None:
            kept = (call.kept if call.protected is None else call.kept | call.protected) & valid
            self.counts = count(self.image_mask & kept, kept, call.suffix or 1)
        else:
            keep = keep_counts(self.counts.image, self.program.ratio, self.counts.protected)
            chosen = choose(self._attention_to(before), self.image_mask, keep, call.protected)
            kept = valid & (~self.image_mask | chosen)
            if call.cache is None:  # with a cache the prompt does not come again
                carry.remember_chosen(self.anatomy, call.embeds, kept)
            self.counts = replace(self.counts, image=keep)
        both = tuple(a + b for a, b in zip(self.counts.image, self.counts.text, strict=True))
        self.main = positions(kept, both)
        if not self._only_suffix():
            self.base = hidden
        self.image_mask = self.image_mask.gather(1, self.main.index)
        if self.main.valid is not None:
            self.image_mask = self.image_mask & self.main.valid
        self.main_stream = self.substream(KEPT, self.main, hidden)
        return self.main.take(hidden)

    @torch.no_grad()
    def _attention_to(self, before: Tensor) -> Tensor:
        """Attention of the prompt's last token at the layer before pruning: float32 [batch, tokens]."""
        assert self.prune_at is not None
        call = self.call
        layer = self.layers[self.prune_at - 1]
        last = call.last_index()
        rows = torch.arange(len(last), device=last.device)
        rotary = PositionSet(last[:, None], None).take_rotary(self.full.rotary)
        query = projections.queries(layer, before[rows, last][:, None], rotary)
        if call.cache is None:
            key = projections.keys(layer, before, self.full.rotary)
        else:
            key = call.cache.keys_of(self.prune_at - 1)
        keys = self.full.keys
        allowed = compat.visible(self.config, (last + call.seen)[:, None], keys.index, keys.valid)[:, 0]
        return projections.attention_of_query(query, key, allowed, float(layer.self_attn.scaling))[:, call.seen :]

    # --- calling layers -----------------------------------------------------------------------------------------------

    def layer(self, number: int, hidden: Tensor, stream: Stream) -> Tensor:
        """Run one layer on a stream."""
        watch.tell(number, stream, stream)
        layer = self.layers[number]
        hidden = prime(hidden, layer)
        return compat.call_layer(
            layer, hidden, attention_mask=stream.mask(self.backend_of(number)), position_ids=stream.position_ids,
            position_embeddings=stream.rotary, past_key_values=self.call.cache, use_cache=self.call.use_cache,
            cache_position=self.call.cache_position if stream is self.full else stream.cache_position,
            checkpoint=hidden.requires_grad,
        )  # fmt: skip

    def suffix_only(self, number: int, hidden: Tensor, stream: Stream) -> Tensor:
        """Run the last layer where only the last positions are read: the others give keys and values."""
        layer, last = self.layers[number], self.call.suffix
        assert last is not None
        watch.tell(number, stream, stream, last)
        cut = hidden.shape[1] - last
        cos, sin = stream.rotary
        return feed.call_with_keys(
            layer, prime(hidden[:, cut:], layer), hidden[:, :cut], rotary=(cos[:, cut:], sin[:, cut:]),
            others_rotary=(cos[:, :cut], sin[:, :cut]), merge=feed.in_front,
            attention_mask=stream.mask(self.backend_of(number), last), past_key_values=self.call.cache,
        )  # fmt: skip

    def _whole_or_suffix(self, number: int, hidden: Tensor) -> Tensor:
        if number == len(self.layers) - 1 and self.lean(hidden):
            return self.suffix_only(number, hidden, self.main_stream)
        return self.layer(number, hidden, self.main_stream)

    def lean(self, hidden: Tensor, text_only: bool = False) -> bool:
        """Whether the last layer need only answer at the last positions."""
        if not self._only_suffix() or self.call.suffix is None or not self.program.leaves_out:
            return False
        all_text = self.call.counts is None or self.call.counts.suffix_text
        return self.call.suffix < hidden.shape[1] and (not text_only or all_text)

    def _only_suffix(self) -> bool:
        call = self.call
        valid = call.counts is None or call.counts.suffix_valid
        return call.suffix is not None and valid and not call.recording

    def text_rows(self) -> Tensor:
        """The mask of a layer that text asks and whose keys are all main positions, in the main order."""
        key = (id(self.main_stream), id(self.text_stream))
        if key not in self._text_rows:
            self._text_rows[key] = self.main_stream.mask_among(self.text_stream.new)
        return self._text_rows[key]

    def backend_of(self, number: int) -> str:
        """The attention backend that a layer runs."""
        layer = self.layers[number]
        return compat.attention_of(layer.self_attn.config)

    def record(self, states: Tensor, columns: PositionSet | None) -> None:
        """Note a layer's output at some columns of this call (None: all) for output_hidden_states."""
        if self.recorded is None:
            return
        if columns is not None:
            absent = states.new_full((len(states), self.call.queries, states.shape[2]), float("nan"))
            states = put_back(absent, columns, states)
        self.recorded.append(states)
