"""One forward pass of a host model that somebody looks into: where its image positions are, and whether it can be run.

Hooks are the caller's; what is here is the same for every measurement that looks into the decoder.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.core.errors import HostError, InputError
from llava_patch.core.finite import why_not_finite
from llava_patch.core.undo import UndoStack
from llava_patch.hosts import call_context, wrappers
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.hosts.host import named_weights
from llava_patch.hosts.wrappers import llava_prepare


@dataclass
class Pass:
    """A forward pass of one sample."""

    text_ids: Tensor  # int64 [text tokens], the sample's token ids without image placeholders, on CPU
    image: Tensor | None = None  # bool [T], image positions in the decoder's input; None: not placed yet
    labels: Tensor | None = None  # int64 [text tokens], the sample's labels at them, on CPU; None: it has none

    @property
    def placed(self) -> Tensor:
        """`image`; HostError where the decoder ran before it was known."""
        if self.image is None:
            raise HostError("the decoder ran before the host told where the image features are")
        return self.image


@contextlib.contextmanager
def watching(anatomy: Anatomy, sample: dict[str, Any], what: str) -> Iterator[tuple[Pass, UndoStack]]:
    """Prepare one pass; call `run` inside. Every hook pushed on the stack is gone afterwards, after an exception too.

    Args:
        anatomy: the host model.
        sample: keyword arguments of its forward, with token ids of int64 [1, tokens].
        what: name of the measurement, for errors.

    Yields:
        (the pass, a stack for the caller's hooks).

    Raises:
        InputError: a batch, or padding; names the measurement.
    """
    ids: Tensor = sample["input_ids"]
    if ids.shape[0] != 1:
        raise InputError(f"{what} takes one sample at a time, got a batch of {ids.shape[0]}")
    mask = sample.get("attention_mask")
    if mask is not None and not bool(mask.bool().all()):
        raise InputError(f"{what} takes samples without padding: attention_mask holds zeros")
    text, labels = ~wrappers.placeholders(anatomy, ids)[0], sample.get("labels")
    seen = Pass(ids[0][text].cpu(), labels=None if labels is None else labels[0][text].cpu())
    with UndoStack() as undo:
        if anatomy.ids_hold_places:
            seen.image = wrappers.placeholders(anatomy, ids)[0]
        else:
            _watch_preparation(anatomy, seen, undo)
        yield seen, undo


def run(anatomy: Anatomy, sample: dict[str, Any]) -> None:
    """The model's own forward, without a cache."""
    anatomy.model(**{**sample, "use_cache": False})


def has_image(anatomy: Anatomy, sample: dict[str, Any]) -> bool:
    """Whether a sample brings an image, or a video, that the decoder sees."""
    brings = any(sample.get(name) is not None for name in anatomy.visual_tokens)
    return brings and bool(wrappers.placeholders(anatomy, sample["input_ids"]).any())


def same_input(one: Pass, other: Pass, number: int, what: str) -> None:
    """Refuse to compare a checkpoint's pass (`one`) with its base's, when the two do not read the same.

    Raises:
        InputError: other text tokens, or image tokens in other places; names the measurement (`what`), the sample's
            number, and what to do.
    """
    ours, theirs = one.placed.cpu(), other.placed.cpu()
    if one.text_ids.tolist() != other.text_ids.tolist():
        raise InputError(
            f"{what}: sample {number} has other text tokens in the checkpoint ({len(one.text_ids)}) than in the base "
            f"({len(other.text_ids)}): their tokenizers or chat templates differ, so that layers cannot be compared; "
            "is it this checkpoint's base?"
        )
    if not torch.equal(ours, theirs):
        raise InputError(
            f"{what}: sample {number} has {int(ours.sum())} image tokens among {len(ours)} in the checkpoint and "
            f"{int(theirs.sum())} among {len(theirs)} in the base, or in other places: position by position nothing "
            "can be compared (a fusion with merge_size = 2 or more tokens an image, another tower, or another "
            "image_aspect_ratio)"
        )


def _watch_preparation(anatomy: Anatomy, seen: Pass, undo: UndoStack) -> None:
    """Have `llava` tell where it places the image features of a sample, before its decoder runs.

    Around whatever is there, so that a routed model's own bookkeeping still runs; but where that already says where
    images are, nothing is asked twice: the labels that `llava_prepare` asks with would tell FastV what to protect.
    """

    def prepare_and_note(prepare: Any, *args: Any, **kwargs: Any) -> tuple:
        if wrappers.reports(prepare):
            outputs = prepare(*args, **kwargs)
            prepared = call_context.prepared_of(outputs[4])
            image_mask = None if prepared is None else prepared.image_mask
        else:
            outputs, image_mask = llava_prepare(prepare, anatomy.image_token_id, *args, **kwargs)
        seen.image = None if image_mask is None else image_mask[0]
        return outputs

    undo.wrap(anatomy.model, "prepare_inputs_labels_for_multimodal", prepare_and_note)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; flags come back."""
    with keeping_flags(model), torch.no_grad():
        model.eval()
        yield


@contextlib.contextmanager
def keeping_flags(model: nn.Module) -> Iterator[None]:
    """Every module's training flag and every parameter's `requires_grad` come back when the block ends."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            if parameter.requires_grad != flag:  # weights made under inference mode refuse to be told even the same
                parameter.requires_grad_(flag)


def check_finite(values: Iterable[float], layer: int, anatomy: Anatomy) -> None:
    """Refuse what overflowed, or comes of broken weights: HostError names the layer and the precision."""
    if not all(map(math.isfinite, values)):
        dtype = next(anatomy.layers[0].parameters()).dtype
        what = f"the hidden states or the attention of layer {layer}"
        raise HostError(why_not_finite(what, dtype, named_weights(anatomy)))
