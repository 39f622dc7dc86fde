"""The host's methods that fill the call context: what a call brings, where its images are, what is read of its output.

Each is an instance attribute around the host's own method; `call_context` says how the decoder gets what they note.
"""

import functools
import inspect
import re
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llava_patch.core.compiled import aside, follow
from llava_patch.core.errors import InputError
from llava_patch.core.undo import UndoStack, meanwhile
from llava_patch.hosts import call_context, compat, lora
from llava_patch.hosts.anatomy import HF, LLAVA, Anatomy
from llava_patch.hosts.call_context import CallContext, HostCall, Stacked, current, host_call, not_routed, prepared_of
from llava_patch.hosts.hf import VIDEOS
from llava_patch.hosts.steps import around_calls

IGNORE_INDEX = -100
_TAKEN = {
    LLAVA: {"images", "image_sizes", "modalities"},
    HF: {"pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy"},
}
_TAKEN_WITH_VIDEOS = {VIDEOS, "image_sizes_videos", "batch_num_images", "vision_aspect_ratio"}
_BRINGS = re.compile("pixel_values|image|video|audio|vision|encoder_outputs")
_REPORTS = "_llava_patch_reports"
_WATCHES = "_llava_patch_watches"
_laying_out = threading.RLock()


def attach(anatomy: Anatomy, undo: UndoStack) -> None:
    """Make a host model report its image positions and what is read of its output.

    Modifications: instance attributes `forward` and `generate` of the causal LM (and those of
    `compat.encode_in_forward`); on `llava` also `prepare_inputs_labels_for_multimodal` and `encode_images`, on HF
    `forward` and `get_image_features` of the inner LlavaModel.
    """
    (_attach_llava if anatomy.host == LLAVA else _attach_hf)(anatomy, undo)
    _attach_generate(anatomy, undo)

    @aside
    def encode_apart(encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with call_context.encoding(anatomy):
            return encode(*args, **kwargs)

    for encoder in anatomy.encoders:
        undo.wrap(*encoder, encode_apart)
    refuse_other_features(anatomy, undo)


def watch(anatomy: Anatomy, undo: UndoStack) -> None:
    """Notice images that are encoded in a call of the host, which must reach a routed decoder (`call_context`).

    Modifications: a forward hook on the projector.
    """
    projector = anatomy.projector
    if any(getattr(hook, _WATCHES, False) for part in projector.modules() for hook in part._forward_hooks.values()):
        return

    @aside
    def note(module: Any, args: Any, output: Any) -> None:
        call = current(anatomy)
        if call is not None:
            call.note_encoded(output.shape[:-1].numel())

    setattr(note, _WATCHES, True)
    hook = projector.register_forward_hook(note)
    undo.push(lambda: lora.unhook(anatomy.projector, hook))


def refuse_other_features(anatomy: Anatomy, undo: UndoStack) -> None:
    """Refuse a call that asks HF for other features of the tower than the model's config, by which a patch goes.

    Modifications: on HF the instance attribute `get_image_features` of the inner LlavaModel.
    """
    if anatomy.host == LLAVA:
        return

    def checked(named: Callable[..., Any], encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = named(args, kwargs)
        for key in ("vision_feature_layer", "vision_feature_select_strategy"):
            value, own = given.get(key), getattr(anatomy.model.config, key)
            if value is not None and value != own:
                raise InputError(
                    f"{key} = {value!r} differs from the model's config ({own!r}), by which the patch goes: leave the "
                    f"argument out, set config.{key} before patch(), or call handle.remove() first"
                )
        return encode(*args, **kwargs)

    for owner, name in anatomy.encoders:
        undo.wrap(owner, name, aside(functools.partial(checked, arguments_of(getattr(owner, name)))))


def arguments_of(function: Callable[..., Any]) -> Callable[[tuple, dict[str, Any]], dict[str, Any]]:
    """What puts a function's arguments under their names."""
    order = list(inspect.signature(function).parameters)
    return lambda args, kwargs: {**dict(zip(order, args, strict=False)), **kwargs}


def _attach_generate(anatomy: Anatomy, undo: UndoStack) -> None:
    named = arguments_of(anatomy.model.generate)

    @aside
    def generate_in_context(generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with host_call(anatomy) as call, call.images_of(_brought(anatomy, named(args, kwargs))):
            _check_arguments(call, kwargs)
            with call.generation():
                # `llava` knows no logits_to_keep; every way of generating but assisted decoding reads the last
                # position.
                assisted = kwargs.get("assistant_model") or kwargs.get("prompt_lookup_num_tokens")
                if anatomy.host == LLAVA and not assisted:
                    call.waiting.context.suffix = 1
                return generate(*args, **kwargs)

    undo.wrap(anatomy.model, "generate", generate_in_context)
    compat.encode_in_forward(anatomy.model, undo)


def _attach_hf(anatomy: Anatomy, undo: UndoStack) -> None:
    wrapper, named = anatomy.wrapper, arguments_of(anatomy.model.forward)
    named_inside = arguments_of(wrapper.forward)

    @aside
    def outer_and_report(outer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = named(args, kwargs)
        with host_call(anatomy) as call, call.images_of(_brought(anatomy, given)):
            _check_arguments(call, given)
            keep = given.get("logits_to_keep")
            call.waiting.context.suffix = keep if isinstance(keep, int) and keep > 0 else None
            call.waiting.context.read = _read(given.get("labels"))
            return outer(*args, **kwargs)  # follows the host's own: `graphs`

    @aside
    def inner_and_report(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = named_inside(args, kwargs)
        with host_call(anatomy) as call, call.images_of(brought := _brought(anatomy, given)):
            _check_arguments(call, given)
            context, ids, embeds = call.waiting.context, given.get("input_ids"), given.get("inputs_embeds")
            context.stacked, context.kept, context.places = None, None, {}
            context.unknown = ids is None and brought is None
            for argument, number in anatomy.visual_tokens.items():
                if given.get(argument) is None:
                    continue
                if ids is not None:
                    context.places[argument] = hf_image_mask(ids, number)
                elif embeds is not None:
                    # The host recognises placeholders by their embedding, as its module gives it (peft adds to it).
                    token = torch.tensor(number, dtype=torch.long, device=embeds.device)
                    context.places[argument] = (embeds == wrapper.get_input_embeddings()(token)).all(-1)
            masks = list(context.places.values())
            context.image_mask = functools.reduce(torch.logical_or, masks) if masks else None
            return inner(*args, **kwargs)

    undo.wrap(anatomy.model, "forward", around_calls(anatomy, outer_and_report))
    undo.wrap(wrapper, "forward", around_calls(anatomy, inner_and_report, opens=False))


def hf_image_mask(input_ids: Tensor, number: int) -> Tensor:
    """Bool mask [batch, tokens] of the placeholders that HF's processor already expanded, by the config at the call."""
    return input_ids == number


def placeholders(anatomy: Anatomy, input_ids: Tensor) -> Tensor:
    """Which token ids mark images or videos: bool [batch, tokens]; on HF one for each of their tokens."""
    return torch.isin(input_ids, torch.tensor([*anatomy.visual_tokens.values()], device=input_ids.device))


def _brought(anatomy: Anatomy, given: dict[str, Any]) -> Any:
    """What of a call's arguments brings images or videos; None: nothing."""
    return next((given[name] for name in anatomy.visual_tokens if given.get(name) is not None), None)


def _attach_llava(anatomy: Anatomy, undo: UndoStack) -> None:
    model, image_token_id = anatomy.model, anatomy.image_token_id
    named, named_of_prepare = arguments_of(model.forward), arguments_of(model.prepare_inputs_labels_for_multimodal)

    @aside
    def prepare_and_report(prepare: Callable[..., tuple], *args: Any, **kwargs: Any) -> tuple:
        given = named_of_prepare(args, kwargs)
        with host_call(anatomy) as call:
            call.offered = call.choice = None
            outputs, image_mask = llava_prepare(prepare, image_token_id, *args, **kwargs)
            context, embeds = call.waiting.context, outputs[4]
            context.image_mask, context.read = image_mask, _read(outputs[5])
            if image_mask is not None and embeds is not None:
                without = dict.fromkeys(("position_ids", "past_key_values", "labels"))
                again = functools.partial(prepare, **{**given, **without})
                if call.offered is not None:
                    context.stacked = _stack(call, call.offered, image_mask, again)
                if call.choice is not None:
                    context.kept = _stays(call, call.choice, image_mask, embeds, again)
                prepared = CallContext(image_mask, stacked=context.stacked, kept=context.kept)
                setattr(embeds, call_context.PREPARED, prepared)
                if call.waiting.own:
                    call.waiting.prepared.append((embeds, prepared))
        return outputs

    @aside
    def forward_in_context(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = named(args, kwargs)
        images, embeds = given.get("images"), given.get("inputs_embeds")
        with host_call(anatomy) as call, call.images_of(images):
            _check_arguments(call, given)
            context = call.waiting.context
            suffix = context.suffix
            if images is not None:  # generate() prepares the images itself: this call is somebody else's
                context.suffix = None
            if embeds is not None:
                context.read = _read(given.get("labels"))
                # generate's own are copied on their way and lose the mark; whoever calls in between brings others.
                context.unknown = not call.waiting.own and prepared_of(embeds) is None
                if call.waiting.own and call.waiting.prepared:
                    found = call.find_prepared(embeds) or CallContext(unknown=True)
                    context.image_mask, context.stacked, context.kept = found.image_mask, found.stacked, found.kept
                    context.unknown = found.unknown
                call.waiting.own = False
            try:
                return follow(forward, *args, **kwargs)
            finally:
                call.waiting.context.suffix = suffix

    undo.wrap(model, "prepare_inputs_labels_for_multimodal", prepare_and_report)
    setattr(model.prepare_inputs_labels_for_multimodal, _REPORTS, True)
    undo.wrap(model, "forward", forward_in_context)


def _stack(call: HostCall, features: list[Tensor], image_mask: Tensor, prepare: Callable[[], tuple]) -> Stacked:
    """DeepStack's features, each where the host puts its image: it prepares the call again, with them for the image's.

    So they are cut, joined and pooled as the image is (anyres, videos). A line's end is what comes without features; it
    takes no tap.
    """
    batch, tokens = image_mask.shape
    laid_out = functools.partial(_laid_out, call, prepare)
    with torch.no_grad():
        ends = laid_out(torch.zeros_like(features[0])).any(-1).view(batch, tokens)
    rows = torch.arange(1, batch * tokens + 1, device=image_mask.device).view(batch, tokens)
    return Stacked([laid_out(feature) for feature in features], rows * (image_mask & ~ends))


def _stays(call: HostCall, choice: Tensor, image_mask: Tensor, embeds: Tensor, prepare: Callable[[], tuple]) -> Tensor:
    """Which positions a choice of tokens, bool [images (or tiles), tokens], leaves in: bool [batch, tokens].

    Laid out by the host as the image is, a token that leaves is 1 and one that stays 2, with the other sign in every
    second channel, which no line's end has: those leave.
    """
    signs = torch.tensor([1.0, -1.0], device=choice.device).repeat(embeds.shape[2] // 2)
    with torch.no_grad():
        marks = _laid_out(call, prepare, ((1.0 + choice[..., None].float()) * signs)).view(embeds.shape)[..., :2]
        first, second = marks.unbind(-1)
        first = torch.where(first == -second, first, torch.zeros_like(first))
        call_context.check_unblended(first)
        return ~image_mask | (first == 2).to(image_mask.device)


def _laid_out(call: HostCall, prepare: Callable[[], tuple], feature: Tensor) -> Tensor:
    """Where the host puts features [images (or tiles), tokens, hidden] in place of the image's: [positions, hidden].

    Text is zeros there; `prepare` prepares the call again.
    """

    def no_text(embed: Callable[..., Tensor], ids: Tensor) -> Tensor:
        return feature.new_zeros(*ids.shape, feature.shape[-1]) if current(call.anatomy) is call else embed(ids)

    with _laying_out, meanwhile(call, instead=feature), UndoStack() as undo:
        undo.wrap(call.anatomy.embed_tokens, "forward", no_text)  # calls in other threads may come by
        embeds: Tensor = prepare()[4]
    return embeds.flatten(0, 1)


def llava_prepare(
    prepare: Callable[..., tuple], image_token_id: int, *args: Any, **kwargs: Any
) -> tuple[tuple, Tensor | None]:
    """Run llava's `prepare_inputs_labels_for_multimodal` and learn where the image features went.

    The host returns embeddings without saying which of them are image features. It does keep labels aligned, so labels
    that hold each text token's own index come back as -100 exactly at image features and padding; padding is told apart
    by the attention mask, and the caller's labels are recovered through the indices.

    `prepare` is the host's bound method; of its arguments ids, mask and labels are [batch, tokens], images [images, 3,
    height, width] or a list. InputError: the numbers of placeholders and of images disagree.

    Returns:
        (what the stock method would have returned, bool mask [batch, new tokens] or None when there is no image).
    """
    given = arguments_of(prepare)(args, kwargs)
    input_ids, attention_mask, images = (given.get(name) for name in ("input_ids", "attention_mask", "images"))
    if images is None or input_ids is None or input_ids.shape[1] == 1:
        return prepare(*args, **kwargs), None
    placeholders = input_ids == image_token_id
    if attention_mask is not None:
        placeholders = placeholders & attention_mask.bool()
    # A sample without a placeholder still consumes one (dummy) image in the host's loop.
    needed = int(placeholders.sum(1).clamp(min=1).sum())
    if needed != len(images):
        raise InputError(
            f"image tokens and images disagree: {int(placeholders.sum())} image tokens in {len(input_ids)} samples "
            f"need {needed} images (a sample without an image token needs one dummy image), got {len(images)}"
        )
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask
    own_index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    outputs: tuple = prepare(**{**given, "attention_mask": valid, "labels": own_index})
    new_ids, new_positions, new_mask, past_key_values, embeds, index = outputs
    labels = given.get("labels")
    if embeds is None:  # the host had nothing to insert (no vision tower)
        return (new_ids, new_positions, attention_mask, past_key_values, None, labels), None
    if labels is not None:
        labels = labels.gather(1, index.clamp(min=0)).masked_fill(index == IGNORE_INDEX, IGNORE_INDEX)
    kept_mask = None if attention_mask is None else new_mask
    image_mask = (index == IGNORE_INDEX) & new_mask.bool()
    return (new_ids, new_positions, kept_mask, past_key_values, embeds, labels), image_mask


def reports(prepare: Any) -> bool:
    """Whether a prepare_inputs_labels_for_multimodal of `llava` has its embeddings say where their images are."""
    return getattr(prepare, _REPORTS, False)


@functools.cache
def _brings(name: str) -> bool:
    return _BRINGS.search(name) is not None


def _check_arguments(call: HostCall, given: dict[str, Any]) -> None:
    """Refuse arguments that bring images in another way than the one that is routed; hosts may drop unknown ones.

    HostError instead of InputError: the host itself has encoded images before this call.
    """
    anatomy = call.anatomy
    taken = _TAKEN[anatomy.host] | (_TAKEN_WITH_VIDEOS if anatomy.takes_videos else set())
    for name, value in given.items():
        if value is None or name in taken or not _brings(name):
            continue
        if any(images.rows for images in call.images):
            raise not_routed(anatomy)
        raise InputError(
            f"{name} is not routed on {type(anatomy.model).__name__}, nor are videos or images that are already "
            f"encoded: give still images as {anatomy.pixels_argument}, embeddings inside `with "
            "handle.image_positions(mask):`, or call handle.remove() first"
        )


def _read(labels: Tensor | None) -> Tensor | None:
    """Positions whose next label counts: bool [batch, tokens]."""
    if labels is None:
        return None
    read = torch.zeros_like(labels, dtype=torch.bool)
    read[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return read
