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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llava_patch.core.errors import HostError, InputError
from llava_patch.core.undo import UndoStack
from llava_patch.hosts.anatomy import HF, LLAVA, Anatomy
from llava_patch.hosts.positions import IGNORE_INDEX, hf_image_mask, llava_prepare, llava_rows


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
    level: int = 0
    used: bool = False


@dataclass
class _Images:
    """What became of the images that one call of the host brought.

    Attributes:
        level: the scope's, when the call began.
        rows: how many features the projector gave, for each time it was called before the images were routed.
        routed: whether a call of the decoder has taken them.
    """

    level: int
    rows: list[int] = field(default_factory=list)
    routed: bool = False

    @property
    def wait(self) -> bool:
        return bool(self.rows) and not self.routed


@dataclass
class _Prepared:
    """Embeddings that `llava` has prepared for a generation, which may copy them."""

    embeds: Tensor
    image_mask: Tensor
    stacked: Stacked | None

    def fits(self, embeds: Tensor, exactly: bool) -> bool:
        """Whether the decoder's embeddings are these, repeated for beams or not."""
        own = self.embeds
        if own.shape[1:] != embeds.shape[1:] or len(embeds) % len(own):
            return False
        return not exactly or torch.equal(own.to(embeds).repeat_interleave(len(embeds) // len(own), 0), embeds)


class _Scope:
    """One call of the host, with what waits for the decoder."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.given = Given()
        self.placed: _Placed | None = None
        self.generating = False
        self.own = False  # whether the embeddings that `llava`'s generate itself made are still to come
        self.level = 0  # inside how many calls of the host's encoder: what is called there is another matter
        self.images: list[_Images] = []  # of the calls under way that brought some
        self.prepared: list[_Prepared] = []  # in this generation
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
def _call(anatomy: Anatomy, pixels: Any) -> Iterator[_Scope]:
    """One call of the host's forward or generate: images that it encodes must have reached the decoder at its end.

    Args:
        anatomy: the host model.
        pixels: its images; without any, what is encoded meanwhile is nobody's business.
    """
    with _scope(anatomy) as scope:
        if pixels is None:
            yield scope
            return
        images = _Images(scope.level)
        scope.images.append(images)
        try:
            yield scope
            if images.wait:
                raise _not_routed(anatomy)
        finally:
            scope.images.remove(images)


@contextlib.contextmanager
def _aside(anatomy: Anatomy) -> Iterator[None]:
    """The host's encoder: whoever calls the model in there (to choose features by the question) speaks of another call.

    What waits for the decoder goes on waiting.
    """
    scope = _current.get()
    if scope is None or scope.anatomy.model is not anatomy.model:
        yield
        return
    before = scope.given, scope.generating, scope.own, scope.chosen, scope.prepared
    scope.given, scope.generating, scope.own, scope.chosen, scope.prepared = Given(), False, False, None, []
    scope.level += 1
    try:
        yield
    finally:
        scope.level -= 1
        scope.given, scope.generating, scope.own, scope.chosen, scope.prepared = before


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
        if scope is None or scope.anatomy.model is not anatomy.model or not scope.images:
            return
        for images in scope.images:
            if images.level == scope.images[-1].level and not images.routed:
                images.rows.append(output.shape[:-1].numel())

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
        scope.placed = here = _Placed(image_mask, kept, scope.level)
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
        InputError: a second chunk in a block that speaks of one call, or a block that contradicts the call.
        HostError: images were encoded in this call of the host, but not for this call of the decoder.
    """
    scope = _current.get()
    own = getattr(inputs_embeds, _MARK, None)
    if (
        scope is None
        or scope.anatomy.model is not anatomy.model  # the decoder itself was called
        or (scope.given.image_mask is not None and inputs_embeds is None)  # in between: images come as embeddings
    ):
        return Given(
            image_mask=own,
            stacked=getattr(inputs_embeds, _STACKED, None),
            unknown=inputs_embeds is not None and own is None,
        )
    given = scope.given
    scope.given = Given(suffix=given.suffix)
    given.generating = scope.generating
    if own is not None:  # whatever was prepared last
        given.image_mask, given.stacked = own, getattr(inputs_embeds, _STACKED, None)
    told = given.image_mask is not None
    if scope.placed is not None and scope.placed.level == scope.level:
        _take_placed(scope.placed, given, inputs_embeds, continuing)
    here = [images for images in scope.images if images.level == scope.level]
    waiting = [images for images in here if images.wait]
    if given.image_mask is not None:
        if waiting and not _holds(anatomy, given.image_mask, waiting, told):
            raise _not_routed(anatomy)
        for images in here:
            images.routed = True
    elif waiting and inputs_embeds is not None and not continuing:
        raise _not_routed(anatomy)
    if scope.generating:
        given.ahead = 0 if given.suffix is None else given.suffix - 1
        if given.kept is None and scope.chosen is not None and inputs_embeds is not None and not continuing:
            prompt, kept = scope.chosen
            start = inputs_embeds[:, : prompt.shape[1]]
            if start.shape == prompt.shape and torch.equal(start, prompt):  # not another prompt in between
                given.kept = _longer(kept, inputs_embeds.shape[1], True)
    return given


def _holds(anatomy: Anatomy, image_mask: Tensor, waiting: list[_Images], told: bool) -> bool:
    """Whether an image mask can be of the features that wait; asks the device once for every prompt with images.

    Args:
        anatomy: the host model.
        image_mask: bool [batch, tokens].
        waiting: what was encoded.
        told: whether the host's own call says where its images are, not a block of `placed` alone.
    """
    if anatomy.host == LLAVA and told:
        return True  # the host has placed them: it cuts long prompts, and a text's dummy image goes nowhere
    places, rows = int(image_mask.sum()), [n for images in waiting for n in images.rows]
    if anatomy.host == LLAVA or anatomy.tiles:
        return places > 0  # which joins features, cuts them and ends lines
    return places in rows or any(places == sum(images.rows) for images in waiting)


def _take_placed(here: _Placed, given: Given, inputs_embeds: Tensor | None, continuing: bool) -> None:
    tokens = 1 if inputs_embeds is None else inputs_embeds.shape[1]
    if here.used and continuing:
        if tokens > 1 and not given.generating:
            raise InputError("image_positions(...) speaks of one call: open a block of its own for every chunk")
        return
    here.used = True
    # Generation without a cache comes again with one more token.
    if here.image_mask is not None:
        asked = _longer(here.image_mask, tokens, False) if given.generating else here.image_mask
        if given.image_mask is not None and _contradicts(asked, given.image_mask):
            raise InputError(
                "image_positions(image_mask=...) contradicts the call, which brings images of its own and places them "
                "elsewhere: leave the block out where the call brings pixels, or give the positions that they take"
            )
        given.image_mask = asked
    if here.kept is not None:
        given.kept = _longer(here.kept, tokens, True) if given.generating else here.kept


def _contradicts(asked: Tensor, known: Tensor) -> bool:
    if asked.shape[1] < known.shape[1] or len(known) % len(asked):
        return False  # it does not fit at all, which is found later
    asked = asked[:, asked.shape[1] - known.shape[1] :].repeat_interleave(len(known) // len(asked), 0)
    return not torch.equal(asked.to(known.device), known)


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
    if anatomy.host == LLAVA or scope.given.image_mask is None or scope.given.stacked is not None:
        return  # `llava` has yet to say where they go; others than the first are not the host's
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
    `prepare_inputs_labels_for_multimodal` and `encode_images`, on HF `forward` and `get_image_features` of the inner
    LlavaModel.
    """
    if anatomy.host == LLAVA:
        _attach_llava(anatomy, undo)
    else:
        _attach_hf(anatomy, undo)
    _attach_generate(anatomy, undo)
    _attach_encoder(anatomy, undo)


def _attach_encoder(anatomy: Anatomy, undo: UndoStack) -> None:
    owner, name = anatomy.encoder
    encode = getattr(owner, name)

    @functools.wraps(encode)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        with _aside(anatomy):
            return encode(*args, **kwargs)

    undo.set_attribute(owner, name, scoped)
    refuse_other_features(anatomy, undo)


def refuse_other_features(anatomy: Anatomy, undo: UndoStack) -> None:
    """Refuse a call that asks HF for other features of the tower than the model's config, by which a patch goes.

    Modifications: on HF the instance attribute `get_image_features` of the inner LlavaModel.
    """
    if anatomy.host == LLAVA:
        return
    owner, name = anatomy.encoder
    encode = getattr(owner, name)
    order = list(inspect.signature(encode).parameters)

    @functools.wraps(encode)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(order, args, strict=False)), **kwargs}
        for key in ("vision_feature_layer", "vision_feature_select_strategy"):
            value, own = given.get(key), getattr(anatomy.model.config, key)
            if value is not None and value != own:
                raise InputError(
                    f"{key} = {value!r} differs from the model's config ({own!r}), by which the patch goes: leave the "
                    f"argument out, set config.{key} before patch(), or call handle.remove() first"
                )
        return encode(*args, **kwargs)

    undo.set_attribute(owner, name, checked)


def _attach_generate(anatomy: Anatomy, undo: UndoStack) -> None:
    generate = anatomy.model.generate
    order = list(inspect.signature(generate).parameters)
    pixels = _pixels(anatomy)

    @functools.wraps(generate)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(order, args, strict=False)), **kwargs}
        with _call(anatomy, given.get(pixels)) as scope:
            _check_arguments(anatomy, scope, kwargs)
            before = scope.generating, scope.chosen, scope.own, scope.prepared
            scope.generating, scope.chosen, scope.own, scope.prepared = True, None, anatomy.host == LLAVA, []
            # `llava` knows no logits_to_keep; every way of generating but assisted decoding reads the last position.
            assisted = kwargs.get("assistant_model") or kwargs.get("prompt_lookup_num_tokens")
            if anatomy.host == LLAVA and not assisted:
                scope.given.suffix = 1
            try:
                return generate(*args, **kwargs)
            finally:
                scope.generating, scope.chosen, scope.own, scope.prepared = before
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
                if scope.own:
                    scope.prepared.append(_Prepared(outputs[4], image_mask, scope.given.stacked))
        return outputs

    def _stack(
        features: list[Tensor], image_mask: Tensor, input_ids: Tensor, position_ids: Any, attention_mask: Any,
        past_key_values: Any, labels: Any, images: Any, *args: Any, **kwargs: Any,
    ) -> Stacked:  # fmt: skip
        rows = llava_rows(prepare, image_mask, features[0].shape, input_ids, attention_mask, images, *args, **kwargs)
        return Stacked([f.flatten(0, 1) for f in features], rows)

    @functools.wraps(forward)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(order, args, strict=False)), **kwargs}
        with _call(anatomy, given.get("images")) as scope:
            _check_arguments(anatomy, scope, given)
            suffix = scope.given.suffix
            if given.get("images") is not None:  # generate() prepares the images itself: this call is somebody else's
                scope.given.suffix = None
            if given.get("inputs_embeds") is not None:
                scope.given.read = _read(given.get("labels"))
                # generate's own are copied on their way and lose the mark; whoever calls in between brings others.
                scope.given.unknown = not scope.own and not hasattr(given["inputs_embeds"], _MARK)
                if scope.own and scope.prepared:
                    several = len(scope.prepared) > 1
                    found = [p for p in scope.prepared if p.fits(given["inputs_embeds"], exactly=several)]
                    scope.given.unknown = not found
                    scope.given.image_mask = found[-1].image_mask if found else None
                    scope.given.stacked = found[-1].stacked if found else None
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
    order = list(inspect.signature(outer).parameters)

    @functools.wraps(outer)
    def outer_and_report(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(order, args, strict=False)), **kwargs}
        with _call(anatomy, given.get("pixel_values")) as scope:
            _check_arguments(anatomy, scope, given)
            keep = given.get("logits_to_keep")
            scope.given.suffix = keep if isinstance(keep, int) and keep > 0 else None
            scope.given.read = _read(given.get("labels"))
            return outer(*args, **kwargs)

    @functools.wraps(inner)
    def inner_and_report(
        input_ids: Tensor | None = None, pixel_values: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        with _call(anatomy, pixel_values) as scope:
            _check_arguments(anatomy, scope, kwargs)
            scope.given.image_mask = scope.given.stacked = None
            scope.given.unknown = input_ids is None and pixel_values is None
            if pixel_values is not None:
                image_token_id = anatomy.image_token_id  # the host reads its config at every call
                if input_ids is not None:
                    scope.given.image_mask = hf_image_mask(input_ids, image_token_id)
                elif (embeds := kwargs.get("inputs_embeds")) is not None:
                    # The host recognises placeholders by their embedding, as its module gives it (peft adds to it).
                    token = torch.tensor(image_token_id, dtype=torch.long, device=embeds.device)
                    scope.given.image_mask = (embeds == wrapper.get_input_embeddings()(token)).all(-1)
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
        if any(images.wait for images in scope.images):
            raise _not_routed(anatomy)
        pixels = _pixels(anatomy)
        raise InputError(
            f"{name} is not routed on {type(anatomy.model).__name__}, nor are videos or images that are already "
            f"encoded: give still images as {pixels}, embeddings inside `with handle.image_positions(mask):`, or call "
            "handle.remove() first"
        )


def _pixels(anatomy: Anatomy) -> str:
    return "images" if anatomy.host == LLAVA else "pixel_values"


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
