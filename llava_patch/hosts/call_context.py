"""What the host's wrapper knows of a call, carried to its decoder: image positions above all.

On `llava` only `inputs_embeds` reach the decoder, and `generate` may copy them; on HF the decoder never sees
`input_ids`. A context variable around the wrapper's call works for both and keeps concurrent calls apart: `wrappers`
fills the `CallContext` of the call under way, and the decoder's routed forward gets it by `take`, once, at prefill.
What decode needs afterwards travels with the cache.

Images that a call has encoded and that no call of the decoder has taken raise at its end (`images_of`).
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llava_patch.core.errors import HostError, InputError
from llava_patch.core.undo import holding, meanwhile
from llava_patch.hosts.anatomy import LLAVA, Anatomy


@dataclass
class Stacked:
    """What DeepStack adds to the image positions of one call."""

    features: list[Tensor]  # for each tap [rows, hidden]
    rows: Tensor  # int64 [batch, tokens]: 1 + the row that a position takes, 0 for none


@dataclass
class CallContext:
    """What the decoder is told about one call."""

    image_mask: Tensor | None = None  # bool [batch, tokens], the image positions; None when the call brings no image
    read: Tensor | None = None  # bool [batch, tokens], positions whose next label counts; None when there are no labels
    # How many of the last positions the caller reads (`logits_to_keep`, generation); None: any may be read.
    suffix: int | None = None
    # [batch, tokens], positions that survive pruning (bool), or how many of its stages each passes (int64), when that
    # was decided before (in the vision tower, or in an earlier call); None: choose.
    kept: Tensor | None = None
    ahead: int = 0  # how many of the tokens are guesses behind the prompt (assisted decoding)
    generating: bool = False  # whether `generate` makes this call
    unknown: bool = False  # the caller brings embeddings of which nobody knows whether images are in them
    stacked: Stacked | None = None  # what DeepStack adds; None without it or without pixels
    # On HF: the positions of what each argument brings, images or videos, until DeepStack has its features of them.
    places: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Placed:
    """Positions set by hand, and whether a call has used them."""

    image_mask: Tensor | None
    kept: Tensor | None
    level: int
    used: bool = False


@dataclass
class _Images:
    """What became of the images that one call of the host brought."""

    level: int  # the host call's, when this one began
    # How many features the projector gave, for each time that it was called; none when the decoder has taken them.
    rows: list[int] = field(default_factory=list)
    routed: bool = False  # whether the decoder has taken some: what is encoded after them need not reach it


@dataclass
class _Waiting:
    """What waits for the decoder."""

    context: CallContext = field(default_factory=CallContext)  # what it will be told
    generating: bool = False  # whether `generate` is under way
    own: bool = False  # whether the embeddings that `llava`'s generate itself made are still to come
    # Embeddings that `llava` has prepared in this generation, which may copy them, and what they say of themselves.
    prepared: list[tuple[Tensor, CallContext]] = field(default_factory=list)
    chosen: tuple[Tensor, Tensor] | None = None  # in this generation, a prompt's embeddings and what pruning kept of it


class HostCall:
    """A call of the host under way; calls that it makes of itself (generate of forward) share it."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy  # the host model
        self.waiting = _Waiting()  # what waits for the decoder
        self.level = 0  # inside how many calls of the host's encoder: what is called there is another matter
        self.images: list[_Images] = []  # of the calls under way that brought some
        self.placed: _Placed | None = None  # positions set by hand
        # DeepStack's features of the images encoded last, for each tap [images, tokens, hidden].
        self.offered: list[Tensor] | None = None
        # Of the images encoded last, which tokens a pruning before layer 0 leaves: bool [images (or tiles), tokens].
        self.choice: Tensor | None = None
        # What the host did to the features encoded last, tiles joined and cut, does the same to others (anyres on HF).
        self.pack: Callable[[Tensor], Tensor] | None = None
        self.instead: Tensor | None = None  # what encoding gives instead of features, on `llava`

    @contextlib.contextmanager
    def generation(self) -> Iterator[None]:
        """Inside the block `generate` calls the model."""
        before = self.waiting
        self.waiting = replace(before, generating=True, own=self.anatomy.host == LLAVA, prepared=[], chosen=None)
        try:
            yield
        finally:
            self.waiting, before.context = before, CallContext()

    @contextlib.contextmanager
    def images_of(self, pixels: Any) -> Iterator[None]:
        """Inside the block the host's forward or generate runs: images it encodes must have reached the decoder after.

        Without pixels, what is encoded meanwhile is nobody's business. HostError: the images have not reached it.
        """
        images = _Images(self.level)
        with meanwhile(self, images=self.images if pixels is None else [*self.images, images]):
            yield
            if images.rows:
                raise not_routed(self.anatomy)

    def note_encoded(self, rows: int) -> None:
        """The projector gave so many features."""
        for images in self.images:
            if images.level == self.images[-1].level and not images.routed:
                images.rows.append(rows)

    def offer(self, features: list[Tensor], argument: str) -> None:
        """Hand DeepStack's features of the images being encoded on: for each tap [images, tokens, hidden].

        `argument` of the call has brought them.
        """
        self.offered, context = features, self.waiting.context
        mask, pack, self.pack = context.places.pop(argument, None), self.pack, None
        if mask is None:
            return  # `llava` has yet to say where they go; on HF others than the first are not the host's
        flat = [f.flatten(0, 1) if pack is None else pack(f) for f in features]
        rows = mask.flatten().cumsum(0).view_as(mask) * mask  # the host fills its placeholders in order
        if (before := context.stacked) is not None:  # images, in a call that brings videos too
            rows = before.rows + (rows + len(before.features[0])) * mask
            flat = [torch.cat(both) for both in zip(before.features, flat, strict=True)]
        context.stacked = Stacked(flat, rows)

    def offer_choice(self, choice: Tensor, argument: str) -> None:
        """Hand on which tokens of the images being encoded stay: bool [images (or tiles), tokens]; `argument` as above.

        InputError: the host makes tokens of several patches.
        """
        self.choice, context = choice, self.waiting.context
        mask, pack, self.pack = context.places.pop(argument, None), self.pack, None
        if mask is None:
            return
        if pack is None:
            flat = choice.flatten()
        else:
            packed = pack(1.0 + choice[..., None].float())[:, 0]  # a line's end is 0
            check_unblended(packed)
            flat = packed == 2
        rows = (mask.flatten().cumsum(0).view_as(mask) - 1).clamp(0, len(flat) - 1)  # the host refuses other numbers
        context.kept = ~mask | flat.to(mask.device)[rows]

    def find_prepared(self, embeds: Tensor) -> CallContext | None:
        """Which of the prepared embeddings these are, repeated for beams or not: [batch, tokens, hidden]."""
        found, single = None, len(self.waiting.prepared) == 1
        for own, prepared in self.waiting.prepared:
            times, rest = divmod(len(embeds), len(own))
            fits = own.shape[1:] == embeds.shape[1:] and rest == 0
            if fits and (single or torch.equal(own.to(embeds).repeat_interleave(times, 0), embeds)):
                found = prepared
        return found


PREPARED = "_llava_patch_prepared"
"""Embeddings that `llava` has prepared hold here, as a `CallContext`, where their images are."""
_current: ContextVar[HostCall | None] = ContextVar("llava_patch_call", default=None)


def current(anatomy: Anatomy) -> HostCall | None:
    """The call of this model that is under way."""
    call = _current.get()
    return call if call is not None and call.anatomy.model is anatomy.model else None


def host_call(anatomy: Anatomy) -> contextlib.AbstractContextManager[HostCall]:
    """Join the call of this model that is under way, or open one."""
    return holding(_current, current(anatomy) or HostCall(anatomy))


def encoding(anatomy: Anatomy) -> contextlib.AbstractContextManager[None]:
    """The host's encoder: who calls the model in there (to choose features by the question) speaks of another call."""
    call = current(anatomy)
    return contextlib.nullcontext() if call is None else meanwhile(call, waiting=_Waiting(), level=call.level + 1)


def not_routed(anatomy: Anatomy) -> HostError:
    """The error for images that were encoded and would not be routed."""
    import transformers

    return HostError(
        "images were encoded, but no call of the decoder routed them: they were encoded outside of the decoder's call "
        "(as generate() does in some versions of transformers), or the decoder or its forward was replaced after "
        f"patch(). {type(anatomy.model).__name__} on transformers {transformers.__version__} would have answered as "
        "the stock model: call handle.remove(), or install a supported version"
    )


def check_unblended(marks: Tensor) -> None:
    """Refuse tokens that a host has made of several patches (InputError): their marks lie between 0, 1 and 2."""
    if not bool((marks == marks.round()).all()):
        raise InputError(
            "the host makes tokens of several patches here (pooling, anyres_max), of which some stay and others leave: "
            "give images of fewer tiles, or take a pruning inside the decoder (FastV)"
        )


def prepared_of(embeds: Tensor | None) -> CallContext | None:
    """What embeddings say of their images; None: nothing."""
    return getattr(embeds, PREPARED, None)


@contextlib.contextmanager
def placed(anatomy: Anatomy, image_mask: Tensor | None, kept: Tensor | None = None) -> Iterator[None]:
    """Tell the decoder the image positions of the call in this block, for embeddings that were merged by hand.

    `image_mask` is bool [batch, tokens] of that call, or of the whole conversation up to its end (None: as the host
    says); `kept` is of the same shape, positions that survive pruning, or, int64, how many of its stages each passes
    (None: choose). InputError: not a mask, or a block in which the model was not called.
    """
    for name, mask in (("image_mask", image_mask), ("kept", kept)):
        if mask is not None and not isinstance(mask, Tensor):
            raise InputError(
                f"image_positions({name}=...): expected a bool tensor [batch, tokens], got {type(mask).__name__}"
            )
        counts = name == "kept" and mask is not None and mask.dtype == torch.int64  # stages passed, see `Pruning`
        if mask is not None and (mask.ndim != 2 or not (counts or mask.dtype == torch.bool)):
            raise InputError(
                f"image_positions({name}=...): expected a bool tensor [batch, tokens], got {mask.dtype} "
                f"{list(mask.shape)}"
            )
    with host_call(anatomy) as call:
        here = _Placed(image_mask, kept, call.level)
        with meanwhile(call, placed=here):
            yield
        if not here.used:
            raise InputError(
                "image_positions(...): the model was not called in this block, or in another thread: its call would "
                "not have known the image positions"
            )


def take(anatomy: Anatomy, inputs_embeds: Tensor | None = None, continuing: bool = False) -> CallContext:
    """What is known of the current call; the image mask is handed out once.

    `inputs_embeds` [batch, tokens, hidden] are those of the caller, if it brings some; on `llava` those that its own
    method has prepared before this call say themselves where their images are. `continuing`: the call goes on from a
    cache that has seen an image.

    Raises:
        InputError: a second chunk in a block that speaks of one call, or a block that contradicts the call.
        HostError: images were encoded in this call of the host, but not for this call of the decoder.
    """
    call, own = current(anatomy), prepared_of(inputs_embeds)
    if call is None or (call.waiting.context.image_mask is not None and inputs_embeds is None):
        # The decoder itself was called, or in between: images come as embeddings.
        return CallContext(unknown=inputs_embeds is not None) if own is None else replace(own)
    waiting, context = call.waiting, call.waiting.context
    waiting.context = CallContext(suffix=context.suffix)
    context.generating = waiting.generating
    if own is not None:  # whatever was prepared last
        context.image_mask, context.stacked, context.kept = own.image_mask, own.stacked, own.kept
    told = context.image_mask is not None
    if call.placed is not None and call.placed.level == call.level:
        _take_placed(call.placed, context, inputs_embeds, continuing)
    _check_routed(call, context.image_mask, told, may_wait=inputs_embeds is None or continuing)
    if waiting.generating:
        context.ahead = 0 if context.suffix is None else context.suffix - 1
        if context.kept is None and waiting.chosen is not None and inputs_embeds is not None and not continuing:
            prompt, kept = waiting.chosen
            start = inputs_embeds[:, : prompt.shape[1]]
            if start.shape == prompt.shape and torch.equal(start, prompt):  # not another prompt in between
                context.kept = _longer(kept, inputs_embeds.shape[1], True)
    return context


def _check_routed(call: HostCall, image_mask: Tensor | None, told: bool, may_wait: bool) -> None:
    """Note which images this call of the decoder takes; refuse it where it leaves some that it should take.

    `told`: the host's own call says where its images are, not a block of `placed` alone. `may_wait`: a call without
    images may come between them and theirs.
    """
    here = [images for images in call.images if images.level == call.level]
    waiting = [images.rows for images in here if images.rows]
    if waiting and not (may_wait if image_mask is None else _holds(call.anatomy, image_mask, waiting, told)):
        raise not_routed(call.anatomy)
    if image_mask is not None:
        for images in here:
            images.routed, images.rows = True, []


def _holds(anatomy: Anatomy, image_mask: Tensor, waiting: list[list[int]], told: bool) -> bool:
    """Whether an image mask can be of the features that wait; asks the device once for every prompt with images."""
    if anatomy.host == LLAVA and told:
        return True  # the host has placed them: it cuts long prompts, and a text's dummy image goes nowhere
    places = int(image_mask.sum())
    if anatomy.host == LLAVA or anatomy.tiles:
        return places > 0  # which joins features, cuts them and ends lines
    return any(places in rows or places == sum(rows) for rows in waiting)


def _take_placed(here: _Placed, context: CallContext, inputs_embeds: Tensor | None, continuing: bool) -> None:
    tokens = 1 if inputs_embeds is None else inputs_embeds.shape[1]
    if here.used and continuing:
        if tokens > 1 and not context.generating:
            raise InputError("image_positions(...) speaks of one call: open a block of its own for every chunk")
        return
    here.used = True
    # Generation without a cache comes again with one more token.
    if here.image_mask is not None:
        asked = _longer(here.image_mask, tokens, False) if context.generating else here.image_mask
        if context.image_mask is not None and _contradicts(asked, context.image_mask):
            raise InputError(
                "image_positions(image_mask=...) contradicts the call, which brings images of its own and places them "
                "elsewhere: leave the block out where the call brings pixels, or give the positions that they take"
            )
        context.image_mask = asked
    if here.kept is not None:
        context.kept = _longer(here.kept, tokens, True) if context.generating else here.kept


def _contradicts(asked: Tensor, known: Tensor) -> bool:
    if asked.shape[1] < known.shape[1] or len(known) % len(asked):
        return False  # it does not fit at all, which is found later
    asked = asked[:, asked.shape[1] - known.shape[1] :].repeat_interleave(len(known) // len(asked), 0)
    return not torch.equal(asked.to(known.device), known)


def _longer(mask: Tensor, tokens: int, value: bool) -> Tensor:
    """More tokens behind, of which a mask says `value`; they pass every stage of a pruning."""
    more = value if mask.dtype == torch.bool else torch.iinfo(mask.dtype).max
    return torch.nn.functional.pad(mask, (0, max(0, tokens - mask.shape[1])), value=more)


def remember_chosen(anatomy: Anatomy, prompt: Tensor, kept: Tensor) -> None:
    """Within one generation pruning chooses once, also where each step recomputes the prompt (use_cache=False).

    The choice `kept` (see `CallContext`) was made for the embeddings `prompt`, [batch, tokens, hidden].
    """
    call = current(anatomy)
    if call is not None and call.waiting.generating and call.waiting.chosen is None:
        call.waiting.chosen = prompt, kept
