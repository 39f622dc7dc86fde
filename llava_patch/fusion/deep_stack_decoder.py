"""DeepStack: a projector for the taps, and how their features reach the decoder."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_patch.core.compiled import aside
from llava_patch.core.errors import HostError
from llava_patch.core.undo import UndoStack, holding, meanwhile
from llava_patch.hosts import call_context, lora, storage, wrappers
from llava_patch.hosts.anatomy import Anatomy, get_handle
from llava_patch.hosts.hf import VIDEOS

_taken: ContextVar[list[list[Tensor]] | None] = ContextVar("llava_patch_taps", default=None)


def add(hidden_states: Tensor, features: Tensor, rows: Tensor) -> Tensor:
    """Add projected taps, `features` [rows, hidden], to the image positions of `hidden_states` [batch, tokens, hidden].

    `rows` is int64 [batch, tokens]: 1 + the row that a position takes, 0 for none, which stays as it is.
    """
    features = F.pad(features.to(hidden_states), (0, 0, 1, 0))
    return hidden_states + F.embedding(rows, features, padding_idx=0)


def note(taps: Sequence[Tensor]) -> None:
    """Hand over the taps of one call of the tower, each [images, tokens, channels]."""
    taken = _taken.get()
    if taken is not None:
        taken.append(list(taps))


def encode(anatomy: Anatomy, pixel_values: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Encode images [images, 3, height, width], normalised, outside a call of a model with DeepStack.

    Returns:
        (projected visual tokens [images, tokens, hidden], for each tap the same of what it adds to them).
    """
    taken: list[list[Tensor]] = []
    with holding(_taken, taken):
        features = anatomy.encode_images(pixel_values)
    return features, _project(anatomy, taken)


def add_projector(anatomy: Anatomy, undo: UndoStack) -> None:
    """Give the taps a projector of their own, which adds nothing before training.

    It starts as a copy of the host's whose last Linear is zero. DeepSpeed ZeRO-3 may have partitioned the original
    (then every rank must call this). HostError: no Linear in it, or one whose end at zero would not be 0.

    Modifications: a module beside the projector.
    """
    original = lora.copies(anatomy.projector_owner, anatomy.projector_name)[0][2]
    projector = storage.plain_copy(original, anatomy.norm.weight.dtype)
    if lora.has_lora(original):
        projector.requires_grad_(any(p.requires_grad for p in anatomy.projector.parameters()))
    linears = [m for m in projector.modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise HostError(f"the projector {type(projector).__name__} has no Linear layer that DeepStack could start at 0")
    if not any(linears[-1] is m for m in (projector, *projector.children())):
        raise HostError(
            "DeepStack starts its projector's last Linear at 0, but this model's adds what that gives to what it gets "
            '(mm_projector_type = ...res...), which is not 0: set DeepStack.projector = "shared" or take another fusion'
        )
    for parameter in linears[-1].parameters():
        nn.init.zeros_(parameter)
    undo.add_module(anatomy.projector_owner, anatomy.stack_name, projector)


def attach(anatomy: Anatomy, undo: UndoStack) -> None:
    """Project the taps where the host projects its images, and send them on to the decoder.

    They are projected there, not where they are added, because every rank of a DeepSpeed ZeRO-3 run must call modules
    in the same order, and because the tower runs under `no_grad` on `llava`.

    Modifications: the instance attribute `encode_images` of the causal LM on `llava`,
    `get_image_features` (with anyres tiles also `pack_image_features`, with videos `get_video_features`) of the inner
    LlavaModel on HF.
    """

    def encode_and_stack(argument: str, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = call_context.current(anatomy)
        if call is None:  # images encoded for their own sake
            return encode(*args, **kwargs)
        if call.instead is not None:
            return call.instead
        taken: list[list[Tensor]] = []
        with holding(_taken, taken):
            features = encode(*args, **kwargs)
        if argument == VIDEOS:
            videos = args[0] if args else next(iter(kwargs.values()))
            call.pack = functools.partial(_pool_frames, anatomy.wrapper, len(videos))
        call.offer(_project(anatomy, taken), argument)
        return features

    for encoder, argument in zip(anatomy.encoders, anatomy.visual_tokens, strict=True):
        undo.wrap(*encoder, aside(functools.partial(encode_and_stack, argument)))
    report_packing(anatomy, undo)


def report_packing(anatomy: Anatomy, undo: UndoStack) -> None:
    """Have HF's models that cut images into tiles say how they join them (`HostCall.pack`).

    Modifications: their instance attribute `pack_image_features`.
    """

    @aside
    def pack_and_report(pack: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call, given = call_context.current(anatomy), wrappers.arguments_of(pack)(args, kwargs)
        if call is not None:
            call.pack = functools.partial(_pack_tiles, pack, given)
        return pack(*args, **kwargs)

    if hasattr(anatomy.wrapper, "pack_image_features"):
        undo.wrap(anatomy.wrapper, "pack_image_features", pack_and_report)


def _pack_tiles(pack: Callable[..., Any], given: dict[str, Any], features: Tensor) -> Tensor:
    """What `pack`, called as `given` says, makes of other features of its tiles: [tokens, hidden].

    `features` are [tiles, tokens, hidden]; line ends become zeros.
    """
    newline, tiles = given.get("image_newline"), [len(f) for f in given["image_features"]]
    ends = None if newline is None else features.new_zeros(features.shape[-1])
    return torch.cat(list(pack(**{**given, "image_features": features.split(tiles), "image_newline": ends})[0]))


def _pool_frames(wrapper: Any, videos: int, features: Tensor) -> Tensor:
    """What the host makes of its videos' frames, of other features [frames, tokens, hidden]: [tokens, hidden].

    The line end behind each video becomes zeros.
    """
    pooled = wrapper.apply_pooling(features)
    return F.pad(pooled.reshape(videos, -1, pooled.shape[-1]), (0, 0, 0, 1)).flatten(0, 1)


def _project(anatomy: Anatomy, taken: list[list[Tensor]]) -> list[Tensor]:
    """Taps of the tower's calls through the projector: for each tap [images, tokens, hidden]."""
    handle, call = get_handle(anatomy.model), call_context.current(anatomy)
    assert handle is not None and handle.fusion is not None
    shared = handle.fusion.shares_projector
    projector: Any = anatomy.projector if shared else getattr(anatomy.projector_owner, anatomy.stack_name)
    first = next(projector.parameters())
    taps = [torch.cat(parts).to(first.dtype) for parts in zip(*taken, strict=True)]
    # What the model's own projector gives here is no image of its own on its way to the decoder (`wrappers.watch`).
    with contextlib.nullcontext() if call is None else meanwhile(call, images=[]):
        return [projector(tap) for tap in taps]
