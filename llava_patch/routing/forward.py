"""The decoder's forward with routing and pruning: what a call brings, and when the stock forward serves it."""

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from llava_patch.core.compiled import aside, follow
from llava_patch.core.errors import InputError
from llava_patch.core.undo import UndoStack, inner
from llava_patch.hosts import call_context, compat, known, steps, zero
from llava_patch.hosts.anatomy import HF, Anatomy
from llava_patch.hosts.call_context import CallContext, Stacked
from llava_patch.routing import side_branch, static_cache
from llava_patch.routing.cache import FULL, RoutedCache
from llava_patch.routing.plan import Counts
from llava_patch.routing.routed_pass import Call, RoutedPass
from llava_patch.routing.schedule import LayerSchedule

logger = logging.getLogger("llava_patch")


class RoutedForward:
    """The decoder's forward with routing; called as the decoder calls its own."""

    def __init__(self, anatomy: Anatomy, schedule: LayerSchedule, undo: UndoStack) -> None:
        self.anatomy, self._undo = anatomy, undo
        self.schedule = schedule
        self.stock = inner(anatomy.decoder, "forward")
        functools.update_wrapper(self, self.stock, updated=())
        self._layers = self._layers_now()

    def _layers_now(self) -> tuple[Any, ...]:
        layers = [zero.bare(layer) for layer in self.anatomy.decoder.layers]  # engines wrap them when training begins
        return (*layers, *(getattr(layer, "self_attn", None) for layer in layers))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A step of decoding behind a static cache, which the compiler follows, or `run`."""
        cache = steps.stepping(kwargs)
        if cache is None:
            return self.run(*args, **kwargs)
        RoutedCache.check_schedule(cache, self.schedule)
        mask, places = kwargs.get("attention_mask"), kwargs.get("position_ids")
        return static_cache.step(self.anatomy.decoder, cache, kwargs["inputs_embeds"], mask, places)

    @aside
    def run(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        *,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Run the decoder; see LlamaModel.forward for the arguments (`cache`: newer versions' `past_key_values`).

        Returns:
            BaseModelOutputWithPast. Where the caller reads only the last positions (generation, `logits_to_keep`),
            `last_hidden_state` holds only those. With `output_hidden_states`, a layer's absent positions are NaN; in
            the last entry every position has the state that it left the decoder with.

        Raises:
            InputError: a cache, mask, backend or output option that routing cannot honour.
            HostError: layers that somebody has replaced by others, or images that would not have been routed.
        """
        cache = past_key_values if cache is None else cache
        routed_before = isinstance(cache, (RoutedCache, static_cache.RoutedStaticCache))
        context = call_context.take(self.anatomy, inputs_embeds, routed_before)
        if context.unknown and context.image_mask is None:
            raise InputError(
                "the model was given inputs_embeds without pixels, so it cannot know where images are in them: call it "
                "inside `with handle.image_positions(mask):`, mask being bool [batch, tokens] (all False: no image)"
            )
        brings_image = context.image_mask is not None
        if brings_image and (now := self._layers_now()) != self._layers:  # somebody put others there
            known.check_decoder(self.anatomy.decoder, "routing")
            compat.prepare_layers(self.anatomy.decoder, self.anatomy.decoder.layers, self._undo)
            self._layers = now
        call, static = None, None
        if brings_image or routed_before or (cache is None and self._keeps_order()):
            held, mask = compat.as_cache(cache), attention_mask
            if inputs_embeds is None:
                inputs_embeds, input_ids = self.anatomy.decoder.embed_tokens(input_ids), None
            if self.anatomy.host == HF and static_cache.takes(held):
                static_cache.check(held, self.schedule, self.anatomy.decoder)
                static, held = held, static_cache.opened(held, self.anatomy.decoder.config)
                mask = static_cache.validity(mask, held.get_seq_length() + inputs_embeds.shape[1])
            self._check(held, mask, position_ids, kwargs)
            call = self._call(context, inputs_embeds, mask, held, use_cache, kwargs)
        if call is None:
            if cache_position is not None:
                kwargs["cache_position"] = cache_position
            kwargs[compat.cache_argument()] = cache
            outputs = follow(
                self.stock, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
            )  # fmt: skip
            return self._with_gradients(outputs, context)
        if cache_position is None:
            cache_position = torch.arange(call.seen, call.seen + call.queries, device=call.embeds.device)
        call.cache_position = cache_position
        call.position_ids = cache_position[None] if position_ids is None else position_ids
        outputs = RoutedPass(self.anatomy, self.schedule, call).forward()
        if static is not None and call.cache is not None:
            static_cache.lay(static, call.cache)
            outputs.past_key_values = static if call.use_cache else None
        return outputs

    def _keeps_order(self) -> bool:
        return side_branch.keeps_order(self.anatomy, [self.anatomy.decoder.layers[i] for i in self.schedule.keys])

    def _with_gradients(self, outputs: Any, context: CallContext) -> Any:
        """The stock outputs; every rank must give what was added a gradient, also one whose batch has no image."""
        if side_branch.wants_gradient(self.anatomy):  # the call brought a cache
            last = outputs.last_hidden_state
            outputs["last_hidden_state"] = last + side_branch.zero_gradient_pass(self.anatomy, last)
        if context.stacked is not None and torch.is_grad_enabled():
            last = outputs.last_hidden_state
            nothing = torch.cat([f[:0] for f in context.stacked.features])  # 0 * a sum is NaN where float16 overflows
            outputs["last_hidden_state"] = last + nothing.sum().to(last)
        return outputs

    def _check(
        self, cache: Any, attention_mask: Tensor | None, position_ids: Tensor | None, kwargs: dict[str, Any]
    ) -> None:
        decoder = self.anatomy.decoder
        asked = kwargs.get("output_attentions")
        configs = (decoder.config, self.anatomy.model.config)  # on HF the outer one does not reach the decoder
        if asked or (asked is None and any(getattr(c, "output_attentions", False) for c in configs)):
            raise InputError(
                "output_attentions is not available on a model that is routed or pruned, or takes DeepStack's taps ("
                "its layers are called one by one): call handle.remove() first, or use the saturation task"
            )
        compat.attention_of(decoder.config)
        for one in (cache, compat.take_held(decoder)):
            if one is not None:
                RoutedCache.check(one, self.schedule)
        if attention_mask is not None and not isinstance(attention_mask, Tensor):
            raise InputError(f"attention_mask: expected a tensor [batch, tokens], got {type(attention_mask).__name__}")
        if attention_mask is not None and (attention_mask.ndim != 2 or attention_mask.is_complex()):
            raise InputError(
                "routing needs a 2-D attention_mask [batch, tokens] of 0 and 1, got "
                f"{attention_mask.ndim} dimensions of {attention_mask.dtype}"
            )
        packed = kwargs.get("cu_seq_lens_q") is not None
        if attention_mask is None and cache is None and position_ids is not None:
            packed |= bool((position_ids.diff() != 1).any())  # so the stock model would take them
        if packed:
            raise InputError("routing takes padded batches, not samples packed into one sequence")

    def _call(
        self,
        context: CallContext,
        embeds: Tensor,
        attention_mask: Tensor | None,
        cache: Any,
        use_cache: bool | None,
        kwargs: dict[str, Any],
    ) -> Call | None:
        """What this call brings; None when the stock forward serves it."""
        decoder, config = self.anatomy.decoder, self.anatomy.decoder.config
        if embeds.ndim != 3:
            raise InputError(f"input_ids: expected [batch, tokens], got embeddings of shape {list(embeds.shape)}")
        batch, queries = embeds.shape[:2]
        warns = context.generating or use_cache is True
        use_cache = bool(getattr(config, "use_cache", False) if use_cache is None else use_cache)
        if decoder.training and getattr(decoder, "gradient_checkpointing", False):
            use_cache = False
        seen = cache.get_seq_length() if cache is not None else 0
        if attention_mask is not None and seen and attention_mask.shape[1] == queries:
            # `llava` makes one for a later turn's own tokens only.
            past = attention_mask.new_ones(batch, seen)
            if isinstance(cache, RoutedCache):
                past = cache.streams[FULL].places.validity().to(attention_mask)
            attention_mask = _joined(past, attention_mask)
        if context.image_mask is not None or isinstance(cache, RoutedCache):  # else the stock forward may take it
            _check_size(attention_mask, batch, seen, queries)
        asked = kwargs.get("output_hidden_states")
        recording = bool(getattr(config, "output_hidden_states", False) if asked is None else asked)
        call = Call(embeds=embeds, attention_mask=attention_mask, seen=seen, use_cache=use_cache, recording=recording)
        padded = isinstance(cache, RoutedCache) and cache.streams[FULL].padded
        if attention_mask is not None and (queries > 1 or padded):
            call.valid = attention_mask[:, -queries:].bool()
        if context.image_mask is not None:
            self._take_images(call, context, warns)
        elif call.valid is None:  # then the last positions are no padding
            call.suffix = context.suffix
        if call.image_mask is None and not isinstance(cache, RoutedCache):
            if cache is not None or not self._keeps_order():
                return None
            call.use_cache, call.in_order, use_cache = False, True, False
        if cache is not None or use_cache:
            cache = compat.new_cache(config) if cache is None else cache
            past_valid = None if attention_mask is None or not seen else attention_mask[:, :seen].bool()
            call.cache = RoutedCache.adopt(cache, self.schedule, past_valid, batch, embeds.device)
        return call

    def _take_images(self, call: Call, context: CallContext, warns: bool) -> None:
        """Fit the context's masks to the call's tokens, and note what is read; one synchronisation with the device."""
        assert context.image_mask is not None
        image_mask = _fit("image positions", context.image_mask, call).to(call.embeds.device)
        call.suffix, call.ahead = context.suffix, context.ahead
        if context.stacked is not None:
            rows = _fit("image rows", context.stacked.rows, call).to(call.embeds.device)
            call.stacked = Stacked(context.stacked.features, rows)
        prunes = self.schedule.prune_at is not None
        if prunes:
            call.protected = _read(call, context) if context.read is None else _fit("labels", context.read, call)
        counts = Counts.of(image_mask, call.valid, context.suffix or 1, call.protected)
        if warns and not counts.suffix_valid:
            _warn_right_padding()
        if min(a + b for a, b in zip(counts.image, counts.text, strict=True)) == call.queries:
            call.valid = None  # a mask of ones is no padding
        if prunes and not context.generating and call.suffix != 1 and not counts.suffix_text:
            call.suffix = None  # some of the last positions may be pruned, as on a plain forward
        if max(counts.image) > 0:
            call.image_mask, call.counts = image_mask if call.valid is None else image_mask & call.valid, counts
            if self.schedule.injections and call.stacked is None:
                raise InputError(
                    "DeepStack adds the image at several decoder layers, but this call brings its embeddings without "
                    "its pixels: give the model pixel_values (llava: images)"
                )
        if context.kept is not None:
            if not prunes:
                raise InputError("image_positions(kept=...): this model prunes nothing")
            stages = len(self.schedule.stages)
            if (context.kept.dtype == torch.bool) != (stages == 1):
                raise InputError(
                    f"image_positions(kept=...): this model prunes in {stages} stage{'s' * (stages > 1)}: give "
                    + ("bool" if stages == 1 else "int64, how many of them each position passes,")
                    + " [batch, tokens], as cache.kept() does"
                )
            call.kept = _fit("kept positions", context.kept, call)


def _joined(past: Tensor, mask: Tensor) -> Tensor:
    """The mask of all tokens, from that of the cached ones; one of other samples stays as it is, to be refused."""
    return torch.cat([past, mask], dim=1) if len(past) == len(mask) else mask


def _check_size(mask: Tensor | None, batch: int, seen: int, queries: int) -> None:
    """Refuse an attention mask of other tokens than the call's: which of them it means, routing cannot know."""
    if mask is not None and mask.shape != (batch, seen + queries):
        cached = f" after {seen} cached ones" if seen else ""
        raise InputError(
            f"attention_mask is {list(mask.shape)}, but the call has {batch} samples of {queries} tokens{cached}: give "
            f"one of [{batch}, {seen + queries}], as the processor makes it"
        )


def _read(call: Call, context: CallContext) -> Tensor:
    """Positions that are read without labels, which pruning must leave in: bool [batch, tokens]."""
    read = torch.zeros(call.embeds.shape[:2], dtype=torch.bool, device=call.embeds.device)
    if context.generating and context.suffix is not None:
        read[:, -context.suffix :] = True
        return read
    return read.scatter_(1, call.last_index()[:, None], True)


@functools.lru_cache(maxsize=1)
def _warn_right_padding() -> None:
    logger.warning(
        "the prompt is padded on the right, where generation goes on from padding, in the stock model too: pad on the "
        'left (tokenizer.padding_side = "left"; llava: config.tokenizer_padding_side = "left")'
    )


def _fit(what: str, mask: Tensor, call: Call) -> Tensor:
    """A mask of the call's own tokens, from one that may also cover earlier ones, or fewer samples (beams)."""
    batch, queries = call.embeds.shape[:2]
    if mask.shape[1] == call.seen + queries:
        mask = mask[:, call.seen :]
    if mask.shape[1] != queries:
        raise InputError(
            f"{what} cover {mask.shape[1]} tokens but the decoder got {queries} (after {call.seen} cached ones): give "
            "them for the call's tokens"
        )
    if not len(mask) or batch % len(mask):
        raise InputError(f"{what} are for {mask.shape[0]} samples but the decoder got {batch}: give a row a sample")
    return mask if len(mask) == batch else mask.repeat_interleave(batch // mask.shape[0], dim=0)
