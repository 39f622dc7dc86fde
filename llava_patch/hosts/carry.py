"""Carries the image positions from the host's wrapper, where they are known, to its decoder, where they are used.

On `llava` only `inputs_embeds` reach the decoder, and `generate` may copy them; on HF the decoder never sees
`input_ids`. A context variable around the wrapper's call works for both and keeps concurrent calls apart. The decoder
takes the mask once, at prefill; what decode needs afterwards travels with the cache.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from llava_patch.hosts.anatomy import LLAVA, Anatomy
from llava_patch.hosts.positions import hf_image_mask, llava_prepare
from llava_patch.undo import UndoStack


class _Scope:
    """One call of the host: the image mask that waits for the decoder."""

    def __init__(self) -> None:
        self.image_mask: Tensor | None = None


_MARK = "_llava_patch_image_mask"
_current: ContextVar[_Scope | None] = ContextVar("llava_patch_image_positions", default=None)


@contextlib.contextmanager
def _scope() -> Iterator[_Scope]:
    active = _current.get()
    if active is not None:  # generate() calls forward(): the outer scope holds the mask
        yield active
        return
    scope = _Scope()
    token = _current.set(scope)
    try:
        yield scope
    finally:
        _current.reset(token)


def take_image_mask(inputs_embeds: Tensor | None = None) -> Tensor | None:
    """The image mask [batch, tokens] of the current call, once; None when there is none.

    Args:
        inputs_embeds: embeddings that the caller may have prepared with the host's own method before this call.
    """
    scope = _current.get()
    prepared: Tensor | None = getattr(inputs_embeds, _MARK, None)
    if scope is None or scope.image_mask is None:
        return prepared
    mask, scope.image_mask = scope.image_mask, None
    return mask


def attach(anatomy: Anatomy, undo: UndoStack) -> None:
    """Make a host model report its image positions.

    Modifications: instance attributes `forward`, `generate` and `prepare_inputs_labels_for_multimodal` of the causal LM
    on `llava`; `forward` of the inner LlavaModel on HF.
    """
    if anatomy.host == LLAVA:
        _attach_llava(anatomy, undo)
    else:
        _attach_hf(anatomy, undo)


def _attach_llava(anatomy: Anatomy, undo: UndoStack) -> None:
    model = anatomy.model
    prepare = model.prepare_inputs_labels_for_multimodal
    image_token_id = anatomy.image_token_id

    @functools.wraps(prepare)
    def prepare_and_report(*args: Any, **kwargs: Any) -> tuple:
        outputs, image_mask = llava_prepare(prepare, image_token_id, *args, **kwargs)
        scope = _current.get()
        if scope is not None:
            scope.image_mask = image_mask
        if image_mask is not None and outputs[4] is not None:
            setattr(outputs[4], _MARK, image_mask)
        return outputs

    undo.set_attribute(model, "prepare_inputs_labels_for_multimodal", prepare_and_report)
    for name in ("forward", "generate"):
        method = getattr(model, name)

        def scoped(*args: Any, _method: Any = method, **kwargs: Any) -> Any:
            with _scope():
                return _method(*args, **kwargs)

        undo.set_attribute(model, name, functools.wraps(method)(scoped))


def _attach_hf(anatomy: Anatomy, undo: UndoStack) -> None:
    wrapper = anatomy.wrapper
    forward = wrapper.forward
    image_token_id = anatomy.image_token_id

    @functools.wraps(forward)
    def forward_and_report(
        input_ids: Tensor | None = None, pixel_values: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        with _scope() as scope:
            scope.image_mask = None
            if pixel_values is not None:
                if input_ids is not None:
                    scope.image_mask = hf_image_mask(input_ids, image_token_id)
                else:  # the host recognises placeholders by their embedding; so must we
                    embeds: Tensor = kwargs["inputs_embeds"]
                    token = anatomy.embed_tokens.weight[image_token_id].to(embeds)
                    scope.image_mask = (embeds == token).all(-1)
            return forward(input_ids, pixel_values, *args, **kwargs)

    undo.set_attribute(wrapper, "forward", forward_and_report)
