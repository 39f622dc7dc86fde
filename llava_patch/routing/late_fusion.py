"""DPVR-LF: the routed forward of a decoder and how it attaches.

Phases (DPVR paper, section 3.2): layers below the split on all positions; the side branch on image positions; text-only
layers; the last K layers on everything again.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from llava_patch.errors import InputError, SettingError
from llava_patch.hosts import carry, compat, zero
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.routing.cache import RoutedCache
from llava_patch.routing.plan import PositionSet, make_plan
from llava_patch.routing.side_branch import copy_layers
from llava_patch.settings import Routing
from llava_patch.undo import UndoStack

SIDE_BRANCH = "side_branch"
logger = logging.getLogger("llava_patch")


def check(settings: Routing, n_layers: int) -> None:
    """Check a split against the model's depth.

    Raises:
        SettingError: split outside 0..L-K (L itself routes nothing and is allowed), or s + n > L.
    """
    split, k, n = int(settings.split), settings.fusion_layers, settings.side_layers
    if split == n_layers:
        return
    if split > n_layers - k:
        raise SettingError(
            f"Routing.split = {split} is outside 0..{n_layers - k}: this model has L = {n_layers} layers and "
            f"Routing.fusion_layers = {k} of them fuse (split = {n_layers} routes nothing)"
        )
    if split + n > n_layers:
        raise SettingError(
            f"Routing.side_layers = {n} with Routing.split = {split}: the side branch starts as a copy of layers "
            f"{split}..{split + n - 1}, but the last layer is {n_layers - 1}"
        )


def attach(anatomy: Anatomy, settings: Routing, undo: UndoStack) -> None:
    """Route image tokens of a host model.

    Modifications: a ModuleList `side_branch` on the decoder, and the decoder's instance attribute `forward`. With
    split = L nothing is routed and nothing is changed.
    """
    check(settings, len(anatomy.layers))
    if settings.split == len(anatomy.layers):
        return
    split = int(settings.split)
    branch = copy_layers(anatomy.layers[split : split + settings.side_layers])
    undo.add_module(anatomy.decoder, SIDE_BRANCH, branch)
    undo.set_attribute(anatomy.decoder, "forward", RoutedForward(anatomy, settings))


def side_parameters(anatomy: Anatomy) -> list[nn.Parameter]:
    """Parameters of the side branch; empty when there is none."""
    branch = getattr(anatomy.decoder, SIDE_BRANCH, None)
    return [] if branch is None else list(branch.parameters())


def _trains(modules: Iterable[nn.Module]) -> bool:
    return torch.is_grad_enabled() and any(p.requires_grad for m in modules for p in m.parameters())


class RoutedForward:
    """The decoder's forward with routing; called as the decoder calls its own."""

    def __init__(self, anatomy: Anatomy, settings: Routing) -> None:
        """Remember the decoder's stock forward, which serves batches without an image."""
        self.anatomy = anatomy
        self.stock = anatomy.decoder.forward
        self.split = int(settings.split)
        self.fusion_start = len(anatomy.layers) - settings.fusion_layers

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the decoder; see LlamaModel.forward for the arguments.

        Returns:
            BaseModelOutputWithPast. With `output_hidden_states`, image positions are NaN in text-only layers.

        Raises:
            InputError: a cache, mask or output option that routing cannot honour.
        """
        image_mask = carry.take_image_mask(inputs_embeds)
        if image_mask is not None and not bool(image_mask.any()):
            image_mask = None
        routed_before = isinstance(past_key_values, RoutedCache)
        if image_mask is None and not routed_before and not self._keeps_order(past_key_values):
            outputs = self.stock(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                cache_position=cache_position,
                **kwargs,
            )
            return self._with_idle_side_branch(outputs)
        return self._routed(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cache_position,
            image_mask, kwargs,
        )  # fmt: skip

    # --- routed path --------------------------------------------------------------------------------------------------

    def _routed(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        cache_position: Tensor | None,
        image_mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> BaseModelOutputWithPast:
        decoder = self.anatomy.decoder
        config = decoder.config
        asked = kwargs.get("output_attentions")
        configs = (config, self.anatomy.model.config)  # on HF the outer one does not reach the decoder
        if asked or (asked is None and any(getattr(c, "output_attentions", False) for c in configs)):
            raise InputError(
                "output_attentions is not available on a routed model (layers see different positions): call "
                "handle.remove() first, or use the saturation task"
            )
        RoutedCache.check(cache)
        if attention_mask is not None and attention_mask.ndim != 2:
            raise InputError(
                f"routing needs a 2-D attention_mask [batch, tokens], got {attention_mask.ndim} dimensions"
            )
        if inputs_embeds is None:
            inputs_embeds = decoder.embed_tokens(input_ids)
        batch, queries = inputs_embeds.shape[:2]
        use_cache = bool(getattr(config, "use_cache", False) if use_cache is None else use_cache)
        if decoder.training and getattr(decoder, "gradient_checkpointing", False):
            use_cache = False
        if image_mask is None and cache is None:
            use_cache = False
        plan = None
        if image_mask is not None:
            image_mask = _fit_mask(image_mask, batch, queries)
            valid = None if attention_mask is None else attention_mask[:, -queries:].bool()
            plan = make_plan(image_mask, valid)
            if use_cache and valid is not None and not bool(valid[:, -1].all()):
                _warn_right_padding()
            if cache is not None or use_cache:
                cache = DynamicCache(config=config) if cache is None else cache
                cache = RoutedCache.adopt(cache, plan.text.index.shape[1], plan.text.valid)
        elif cache is not None:
            new_valid = None
            if attention_mask is not None and (cache.text_valid is not None or queries > 1):
                new_valid = attention_mask[:, -queries:].bool()
            cache.append_text(queries, new_valid)
        seen = cache.get_seq_length() if cache is not None else 0
        if cache_position is None:
            cache_position = torch.arange(seen, seen + queries, device=inputs_embeds.device)
        if position_ids is None:
            position_ids = cache_position[None]
        full_mask = compat.stock_mask(decoder, inputs_embeds, attention_mask, cache_position, cache, position_ids)
        recorded: list[Tensor] | None = [] if _wants_hidden_states(config, kwargs) else None
        common = {"past_key_values": cache, "use_cache": use_cache}

        # Phase 1: layers below the split, every position.
        lower = list(self.anatomy.layers[: self.split])
        keep_graph = self._graph_below_split(inputs_embeds, lower)
        with torch.set_grad_enabled(keep_graph):
            hidden = inputs_embeds if keep_graph else inputs_embeds.detach()
            rotary = decoder.rotary_emb(hidden, position_ids)
            full = {"attention_mask": full_mask, "position_embeddings": rotary, "position_ids": position_ids}
            _record(recorded, hidden)
            for layer in lower:
                hidden = compat.call_layer(
                    layer, hidden, **full, **common, cache_position=cache_position, checkpoint=keep_graph
                )
                _record(recorded, hidden)
        idle = None
        if plan is None and cache is None:
            idle = self._idle_side_branch(hidden, rotary)
            text_states, text_rotary, text_mask = hidden, rotary, full_mask
            n_keys = queries
        elif plan is None:
            text_states, text_rotary = hidden, rotary
            n_keys = cache.text_length
            text_mask = compat.causal_mask(config, hidden, cache.text_valid, n_keys)
        else:
            # Phase 2: the side branch, image positions only.
            side_states = self._side_branch(plan.image.take(hidden), _take_rotary(plan.image, rotary), plan.image.valid)
            text_states, text_rotary = plan.text.take(hidden), _take_rotary(plan.text, rotary)
            n_keys = text_states.shape[1]
            text_mask = compat.causal_mask(config, text_states, plan.text.valid)
        # Phase 3: text-only layers. No position_ids: flash attention would take their gaps for packed samples.
        middle = list(self.anatomy.layers[self.split : self.fusion_start])
        text_states = _prime(text_states, middle)
        text_place = torch.arange(n_keys - text_states.shape[1], n_keys, device=text_states.device)
        for layer in middle:
            if text_states.shape[1]:  # a prompt may be nothing but an image
                text_states = compat.call_layer(
                    layer, text_states, attention_mask=text_mask, position_embeddings=text_rotary, **common,
                    cache_position=text_place, checkpoint=text_states.requires_grad,
                )  # fmt: skip
            _record(recorded, text_states, None if plan is None else plan.text, queries)
        # Phase 4: fusion layers, every position again.
        hidden = text_states if plan is None else plan.merge(side_states, text_states)
        if idle is not None:
            hidden = hidden + idle
        fusion = list(self.anatomy.layers[self.fusion_start :])
        hidden = _prime(hidden, fusion)
        for layer in fusion:
            hidden = compat.call_layer(
                layer, hidden, **full, **common, cache_position=cache_position, checkpoint=hidden.requires_grad
            )
            _record(recorded, hidden)
        hidden = decoder.norm(hidden)
        if recorded is not None:
            recorded[-1] = hidden  # as in the stock decoder, the last entry is after the final norm
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache if use_cache else None,
            hidden_states=None if recorded is None else tuple(recorded),  # type: ignore[arg-type]
        )

    def _side_branch(self, states: Tensor, rotary: tuple[Tensor, Tensor], valid: Tensor | None) -> Tensor:
        branch = getattr(self.anatomy.decoder, SIDE_BRANCH)
        states = _prime(states, branch)
        mask = compat.causal_mask(self.anatomy.decoder.config, states, valid)
        for layer in branch:
            states = compat.call_layer(
                layer, states, attention_mask=mask, position_embeddings=rotary, checkpoint=states.requires_grad
            )
        return states

    def _with_idle_side_branch(self, outputs: Any) -> Any:
        # A rank or micro-batch without an image must still give the side branch a gradient (of zero), or the others
        # wait for it in the all-reduce for ever.
        decoder = self.anatomy.decoder
        branch = getattr(decoder, SIDE_BRANCH)
        if not decoder.training or not _trains(branch):
            return outputs
        last = outputs.last_hidden_state
        place = torch.zeros(1, 1, dtype=torch.long, device=last.device)
        outputs["last_hidden_state"] = last + self._idle_side_branch(last, decoder.rotary_emb(last, place))
        return outputs

    def _idle_side_branch(self, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """The side branch on one made-up position, times zero: a scalar 0 whose gradient reaches its weights."""
        row = torch.zeros_like(hidden[:1, :1])
        return 0.0 * self._side_branch(row, (rotary[0][:1, :1], rotary[1][:1, :1]), None).sum()

    def _keeps_order(self, cache: Any) -> bool:
        # Partitioned weights are put together layer by layer, by all ranks at once: a rank whose batch has no image
        # must run the same modules in the same order as one that routes, forwards and backwards. (DeepSpeed counts
        # modules without weights too: by the order of the first step it decides what to fetch ahead in the next.)
        branch = getattr(self.anatomy.decoder, SIDE_BRANCH)
        return cache is None and zero.is_partitioned(branch.parameters())

    def _graph_below_split(self, inputs_embeds: Tensor, lower: list[nn.Module]) -> bool:
        if not torch.is_grad_enabled():
            return False
        a = self.anatomy
        if _trains([*lower, a.embed_tokens, a.projector, a.tower]):
            return True
        # Embeddings may require a gradient only because gradient checkpointing asked for it: nobody reads that one.
        return inputs_embeds.requires_grad and not compat.input_grads_are_forced(a.model, a.wrapper, a.decoder)


@functools.lru_cache(maxsize=1)
def _warn_right_padding() -> None:
    logger.warning(
        "the prompt is padded on the right, where generation goes on from padding, in the stock model too: pad on the "
        'left (tokenizer.padding_side = "left"; llava: config.tokenizer_padding_side = "left")'
    )


def _fit_mask(image_mask: Tensor, batch: int, tokens: int) -> Tensor:
    if image_mask.shape[1] != tokens:
        raise InputError(
            f"image positions cover {image_mask.shape[1]} tokens but the decoder got {tokens}: chunked prefill is not "
            "available with routing in this version"
        )
    if batch % image_mask.shape[0]:
        raise InputError(f"image positions are for {image_mask.shape[0]} samples but the decoder got {batch}")
    return image_mask.repeat_interleave(batch // image_mask.shape[0], dim=0)


def _take_rotary(positions: PositionSet, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return positions.take(rotary[0]), positions.take(rotary[1])


def _prime(states: Tensor, modules: Iterable[nn.Module]) -> Tensor:
    # Reentrant checkpointing gives no gradient at all unless an input requires one.
    if not states.requires_grad and _trains(modules):
        states = states.detach().requires_grad_()
    return states


def _wants_hidden_states(config: Any, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("output_hidden_states")
    return bool(getattr(config, "output_hidden_states", False) if asked is None else asked)


def _record(recorded: list[Tensor] | None, states: Tensor, text: PositionSet | None = None, tokens: int = 0) -> None:
    if recorded is None:
        return
    if text is not None:
        full = states.new_full((states.shape[0], tokens, states.shape[2]), float("nan"))
        where = text.index.to(states.device)
        keep = torch.ones_like(where, dtype=torch.bool) if text.valid is None else text.valid.to(states.device)
        rows = torch.arange(len(where), device=where.device)[:, None].expand_as(where)
        full = full.index_put((rows[keep], where[keep]), states[keep])
        states = full
    recorded.append(states)
