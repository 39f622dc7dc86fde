"""Carries what the host's wrapper knows of a call to its decoder, where it is used: image positions above all.

On `llava` only `inputs_embeds` reach the decoder, and `generate` may copy them; on HF the decoder never sees
`input_ids`. A context variable around the wrapper's call works for both and keeps concurrent calls apart. The decoder
takes the mask once, at prefill; what decode needs afterwards travels with the cache.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_patch.errors import HostError, InputError
from llava_patch.hosts.anatomy import HF, LLAVA, Anatomy
from llava_patch.hosts.positions import IGNORE_INDEX, hf_image_mask, llava_prepare, llava_rows
from llava_patch.undo import UndoStack


@dataclass
class Stacked:
    """What DeepStack adds to the image positions of one call.

    Attributes:
        features: for each tap [rows, hidden].
        rows: int64 [batch, tokens]: 1 + the row that a position takes, 0 for none.
    """

    features: list[Tensor]
    rows: Tensor


@dataclass
class Given:
    """What the decoder is told about one call.

    Attributes:
        image_mask: bool [batch, tokens], the image positions; None when the call brings no image.
        read: bool [batch, tokens], positions whose next label counts; None when there are no labels.
        suffix: how many of the last positions the caller reads (`logits_to_keep`, generation); None: any may be read.
        kept: bool [batch, tokens], positions that survive pruning, when that was decided before; None: choose.
        ahead: how many of the tokens are guesses behind the prompt (assisted decoding).
        generating: whether `generate` makes this call.
        unknown: the caller brings embeddings of which nobody knows whether images are in them.
        stacked: what DeepStack adds; None without it or without pixels.
    """

    image_mask: Tensor | None = None
    read: Tensor | None = None
    suffix: int | None = None
    kept: Tensor | None = None
    ahead: int = 0
    generating: bool = False
    unknown: bool = False
    stacked: Stacked | None = None


@dataclass
class _Placed:
    """Positions set by hand, and whether a call has used them."""

    image_mask: Tensor | None
    kept: Tensor | None
    used: bool = False


class _Scope:
    """One call of the host, with what waits for the decoder."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.given = Given()
        self.placed: _Placed | None = None
        self.generating = False
        self.own = False  # whether the embeddings that `llava`'s generate itself made are still to come
        self.calls = 0  # how many of the host's methods are under way; 0 inside a block of `placed` alone
        self.encoded = False  # whether images were encoded that no decoder call has taken
        self.offered: list[Tensor] | None = None  # DeepStack's features of the images encoded last
        self.packing: Tensor | None = None  # their rows in the order that anyres gives them
        self.chosen: tuple[Tensor, Tensor] | None = None  # in this generation: a prompt's embeddings, what was kept


_MARK = "_llava_patch_image_mask"
_STACKED = "_llava_patch_stacked"
_REPORTS = "_llava_patch_reports"
_WATCHES = "_llava_patch_watches"
_TAKEN = {
    LLAVA: {"images", "image_sizes", "modalities"},
    HF: {"pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy"},
}
_BRINGS = re.compile("pixel_values|image|video|audio|vision|encoder_outputs")
_current: ContextVar[_Scope | None] = ContextVar("llava_patch_call", default=None)


@contextlib.contextmanager
def _scope(anatomy: Anatomy) -> Iterator[_Scope]:
    active = _current.get()
    if active is not None and active.anatomy.model is anatomy.model:
        yield active  # generate() calls forward(): the outer scope holds the mask
        return
    scope = _Scope(anatomy)
    token = _current.set(scope)
    try:
        yield scope
    finally:
        _current.reset(token)


@contextlib.contextmanager
def _call(anatomy: Anatomy) -> Iterator[_Scope]:
    """One call of the host's forward or generate: images that it encodes must have reached the decoder at its end."""
    with _scope(anatomy) as scope:
        scope.calls += 1
        try:
            yield scope
            if scope.encoded:
                raise _not_routed(anatomy)
        finally:
            scope.calls -= 1
            scope.encoded = False


def _not_routed(anatomy: Anatomy) -> HostError:
    import transformers

    return HostError(
        "images were encoded, but no call of the decoder routed them: they were encoded outside of the decoder's call "
        "(as generate() does in some versions of transformers), or the decoder or its forward was replaced after "
        f"patch(). {type(anatomy.model).__name__} on transformers {transformers.__version__} would have answered as "
        "the stock model: call handle.remove(), or install a supported version"
    )


def watch(anatomy: Anatomy, undo: UndoStack) -> None:
    """Notice images that are encoded in a call of the host and reach no routed decoder; see `_call` and `take`.

    Modifications: a forward hook on the projector.
    """
    projector = anatomy.projector
    if any(getattr(hook, _WATCHES, False) for hook in projector._forward_hooks.values()):
        return

    def note(module: Any, args: Any, output: Any) -> None:
        scope = _current.get()
        if scope is not None and scope.calls and scope.anatomy.model is anatomy.model:
            scope.encoded = True

    setattr(note, _WATCHES, True)
    undo.push(projector.register_forward_hook(note).remove)


@contextlib.contextmanager
def placed(anatomy: Anatomy, image_mask: Tensor | None, kept: Tensor | None = None) -> Iterator[None]:
    """Tell the decoder the image positions of the call in this block, for embeddings that were merged by hand.

    Args:
        anatomy: the host model.
        image_mask: bool [batch, tokens] of that call, or of the whole conversation up to its end; None: as the host
            says.
        kept: bool of the same shape, positions that survive pruning; None: choose.

    Raises:
        InputError: not a mask, or a block in which the model was not called.
    """
    for name, mask in (("image_mask", image_mask), ("kept", kept)):
        if mask is not None and (mask.ndim != 2 or mask.dtype != torch.bool):
            raise InputError(
                f"image_positions({name}=...): expected a bool tensor [batch, tokens], got {mask.dtype} "
                f"{list(mask.shape)}"
            )
    with _scope(anatomy) as scope:
        before = scope.placed
        scope.placed = here = _Placed(image_mask, kept)
        try:
            yield
        finally:
            scope.placed = before
        if not here.used:
            raise InputError(
                "image_positions(...): the model was not called in this block, or in another thread: its call would "
                "not have known the image positions"
            )


def take(anatomy: Anatomy, inputs_embeds: Tensor | None = None, continuing: bool = False) -> Given:
    """What is known of the current call; the image mask is handed out once.

    Args:
        anatomy: the host model.
        inputs_embeds: [batch, tokens, hidden] when the caller brings embeddings; on `llava` those that its own method
            has prepared before this call say themselves where their images are.
        continuing: whether the call goes on from a cache that has seen an image.

    Raises:
        InputError: a second chunk in a block that speaks of one call.
        HostError: images were encoded in this call of the host, but not for this call of the decoder.
    """
    scope = _current.get()
    if scope is None or scope.anatomy.model is not anatomy.model:  # the decoder itself was called
        return Given(
            image_mask=getattr(inputs_embeds, _MARK, None),
            stacked=getattr(inputs_embeds, _STACKED, None),
            unknown=inputs_embeds is not None and not hasattr(inputs_embeds, _MARK),
        )
    given = scope.given
    scope.given = Given(suffix=given.suffix)
    given.generating = scope.generating
    if scope.placed is not None:
        _take_placed(scope.placed, given, inputs_embeds, continuing)
    elif given.image_mask is None:
        given.image_mask = getattr(inputs_embeds, _MARK, None)
    if given.image_mask is not None:
        scope.encoded = False
    elif scope.encoded and not continuing:
        raise _not_routed(anatomy)
    if given.stacked is None:
        given.stacked = getattr(inputs_embeds, _STACKED, None)
    if scope.generating:
        given.ahead = 0 if given.suffix is None else given.suffix - 1
        if given.kept is None and scope.chosen is not None and inputs_embeds is not None and not continuing:
            prompt, kept = scope.chosen
            start = inputs_embeds[:, : prompt.shape[1]]
            if start.shape == prompt.shape and torch.equal(start, prompt):  # not another prompt in between
                given.kept = _longer(kept, inputs_embeds.shape[1], True)
    return given


def _take_placed(here: _Placed, given: Given, inputs_embeds: Tensor | None, continuing: bool) -> None:
    tokens = 1 if inputs_embeds is None else inputs_embeds.shape[1]
    if here.used and continuing:
        if tokens > 1 and not given.generating:
            raise InputError("image_positions(...) speaks of one call: open a block of its own for every chunk")
        return
    here.used = True
    # Generation without a cache comes again with one more token.
    if here.image_mask is not None:
        given.image_mask = _longer(here.image_mask, tokens, False) if given.generating else here.image_mask
    if here.kept is not None:
        given.kept = _longer(here.kept, tokens, True) if given.generating else here.kept


def _longer(mask: Tensor, tokens: int, value: bool) -> Tensor:
    return torch.nn.functional.pad(mask, (0, max(0, tokens - mask.shape[1])), value=value)


def is_listening(anatomy: Anatomy) -> bool:
    """Whether a call of the host is under way whose images go to the decoder."""
    scope = _current.get()
    return scope is not None and scope.anatomy.model is anatomy.model


def offer(anatomy: Anatomy, features: list[Tensor]) -> None:
    """Hand DeepStack's features of the images being encoded on: for each tap [images, tokens, hidden]."""
    scope = _current.get()
    assert scope is not None
    scope.offered = features
    if anatomy.host == LLAVA or scope.given.image_mask is None:
        return  # `llava` has yet to say where they go
    # The host fills its placeholders in order.
    mask = scope.given.image_mask
    rows = mask.flatten().cumsum(0).view_as(mask) * mask
    if scope.packing is not None:
        rows = torch.nn.functional.pad(scope.packing, (1, 0))[rows.clamp(max=len(scope.packing))]
        scope.packing = None
    scope.given.stacked = Stacked([f.flatten(0, 1) for f in features], rows)


def offered(anatomy: Anatomy) -> list[Tensor] | None:
    """What `offer` got last in the call under way; None without DeepStack."""
    return None if (scope := _current.get()) is None or scope.anatomy.model is not anatomy.model else scope.offered


def offer_packing(anatomy: Anatomy, rows: Tensor) -> None:
    """Say in which order anyres gives the features: int64 [features], 1 + the row, 0 for a line end."""
    scope = _current.get()
    assert scope is not None
    scope.packing = rows


def reports(prepare: Any) -> bool:
    """Whether `llava`'s prepare_inputs_labels_for_multimodal already says where images are (see `reported`)."""
    return getattr(prepare, _REPORTS, False)


def reported(embeds: Tensor | None) -> Tensor | None:
    """Image positions of embeddings that such a method has prepared: bool [batch, tokens]; None without an image."""
    return getattr(embeds, _MARK, None)


def remember_chosen(anatomy: Anatomy, prompt: Tensor, kept: Tensor) -> None:
    """Within one generation pruning chooses once, also where each step recomputes the prompt (use_cache=False).

    Args:
        anatomy: the host model.
        prompt: [batch, tokens, hidden], the embeddings that the choice was made for.
        kept: bool [batch, tokens].
    """
    scope = _current.get()
    if scope is not None and scope.anatomy.model is anatomy.model and scope.generating and scope.chosen is None:
        scope.chosen = prompt, kept


def attach(anatomy: Anatomy, undo: UndoStack) -> None:
    """Make a host model report its image positions and what is read of its output.

    Modifications: instance attributes `forward` and `generate` of the causal LM; on `llava` also
    `prepare_inputs_labels_for_multimodal`, on HF `forward` of the inner LlavaModel.
    """
    if anatomy.host == LLAVA:
        _attach_llava(anatomy, undo)
    else:
        _attach_hf(anatomy, undo)
    _attach_generate(anatomy, undo)


def _attach_generate(anatomy: Anatomy, undo: UndoStack) -> None:
    generate = anatomy.model.generate

    @functools.wraps(generate)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        with _call(anatomy) as scope:
            _check_arguments(anatomy, scope, kwargs)
            before = scope.generating, scope.chosen, scope.own
            scope.generating, scope.chosen, scope.own = True, None, anatomy.host == LLAVA
            # `llava` knows no logits_to_keep; every way of generating but assisted decoding reads the last position.
            assisted = kwargs.get("assistant_model") or kwargs.get("prompt_lookup_num_tokens")
            if anatomy.host == LLAVA and not assisted:
                scope.given.suffix = 1
            try:
                return generate(*args, **kwargs)
            finally:
                scope.generating, scope.chosen, scope.own = before
                scope.given = Given()

    undo.set_attribute(anatomy.model, "generate", scoped)


def _attach_llava(anatomy: Anatomy, undo: UndoStack) -> None:
    model = anatomy.model
    prepare = model.prepare_inputs_labels_for_multimodal
    forward = model.forward
    image_token_id = anatomy.image_token_id

    order = list(inspect.signature(forward).parameters)
    prepared_order = list(inspect.signature(prepare).parameters)

    @functools.wraps(prepare)
    def prepare_and_report(*args: Any, **kwargs: Any) -> tuple:
        _check_modalities({**dict(zip(prepared_order, args, strict=False)), **kwargs}.get("modalities"))
        with _scope(anatomy) as scope:
            scope.offered = None
            outputs, image_mask = llava_prepare(prepare, image_token_id, *args, **kwargs)
            scope.given.image_mask = image_mask
            scope.given.read = _read(outputs[5])
            if image_mask is not None and outputs[4] is not None:
                setattr(outputs[4], _MARK, image_mask)
                if scope.offered is not None:
                    scope.given.stacked = _stack(scope.offered, image_mask, *args, **kwargs)
                    setattr(outputs[4], _STACKED, scope.given.stacked)
        return outputs

    def _stack(
        features: list[Tensor], image_mask: Tensor, input_ids: Tensor, position_ids: Any, attention_mask: Any,
        past_key_values: Any, labels: Any, images: Any, *args: Any, **kwargs: Any,
    ) -> Stacked:  # fmt: skip
        rows = llava_rows(prepare, image_mask, features[0].shape, input_ids, attention_mask, images, *args, **kwargs)
        return Stacked([f.flatten(0, 1) for f in features], rows)

    @functools.wraps(forward)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        with _call(anatomy) as scope:
            given = {**dict(zip(order, args, strict=False)), **kwargs}
            _check_arguments(anatomy, scope, given)
            suffix = scope.given.suffix
            if given.get("images") is not None:  # generate() prepares the images itself: this call is somebody else's
                scope.given.suffix = None
            if given.get("inputs_embeds") is not None:
                scope.given.read = _read(given.get("labels"))
                # generate's own are copied on their way and lose the mark; whoever calls in between brings others.
                scope.given.unknown = not scope.own and not hasattr(given["inputs_embeds"], _MARK)
                scope.own = False
            try:
                return forward(*args, **kwargs)
            finally:
                scope.given.suffix = suffix

    setattr(prepare_and_report, _REPORTS, True)
    undo.set_attribute(model, "prepare_inputs_labels_for_multimodal", prepare_and_report)
    undo.set_attribute(model, "forward", scoped)


def _attach_hf(anatomy: Anatomy, undo: UndoStack) -> None:
    model, wrapper = anatomy.model, anatomy.wrapper
    outer, inner = model.forward, wrapper.forward
    image_token_id = anatomy.image_token_id

    order = list(inspect.signature(outer).parameters)

    @functools.wraps(outer)
    def outer_and_report(*args: Any, **kwargs: Any) -> Any:
        with _call(anatomy) as scope:
            given = {**dict(zip(order, args, strict=False)), **kwargs}
            _check_arguments(anatomy, scope, given)
            keep = given.get("logits_to_keep")
            scope.given.suffix = keep if isinstance(keep, int) and keep > 0 else None
            scope.given.read = _read(given.get("labels"))
            return outer(*args, **kwargs)

    @functools.wraps(inner)
    def inner_and_report(
        input_ids: Tensor | None = None, pixel_values: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        with _call(anatomy) as scope:
            _check_arguments(anatomy, scope, kwargs)
            scope.given.image_mask = None
            scope.given.unknown = input_ids is None and pixel_values is None
            if pixel_values is not None:
                if input_ids is not None:
                    scope.given.image_mask = hf_image_mask(input_ids, image_token_id)
                else:  # the host recognises placeholders by their embedding; so must we
                    embeds: Tensor = kwargs["inputs_embeds"]
                    token = anatomy.embed_tokens.weight[image_token_id].to(embeds)
                    scope.given.image_mask = (embeds == token).all(-1)
            return inner(input_ids, pixel_values, *args, **kwargs)

    undo.set_attribute(model, "forward", outer_and_report)
    undo.set_attribute(wrapper, "forward", inner_and_report)


def _check_arguments(anatomy: Anatomy, scope: _Scope, given: dict[str, Any]) -> None:
    """Refuse arguments that bring images in another way than the one that is routed; hosts may drop unknown ones.

    Raises:
        InputError: names the argument.
        HostError: the host itself has encoded images before this call.
    """
    for name, value in given.items():
        if value is None or name in _TAKEN[anatomy.host] or not _BRINGS.search(name):
            continue
        if scope.encoded:
            raise _not_routed(anatomy)
        pixels = "images" if anatomy.host == LLAVA else "pixel_values"
        raise InputError(
            f"{name} is not routed on {type(anatomy.model).__name__}, nor are videos or images that are already "
            f"encoded: give still images as {pixels}, embeddings inside `with handle.image_positions(mask):`, or call "
            "handle.remove() first"
        )


def _check_modalities(modalities: Any) -> None:
    """Refuse what LLaVA-NeXT's package takes beside images ("text" stands for a sample with a dummy image)."""
    asked = [modalities] if isinstance(modalities, str) else modalities or []
    other = [m for m in asked if m not in ("image", "text")]
    if other:
        raise InputError(f"modalities = {other[0]!r} is not routed: give still images, or call handle.remove() first")


def _read(labels: Tensor | None) -> Tensor | None:
    """Positions whose next label counts: bool [batch, tokens]."""
    if labels is None:
        return None
    read = torch.zeros_like(labels, dtype=torch.bool)
    read[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return read
