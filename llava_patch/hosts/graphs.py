"""Where torch.compile's graphs end on a patched host, and where they go on.

How many images a batch has, and where, is in the host's own Python between its image encoder and its decoder: graphs of
that would be made again for every number of images. It runs beside the graphs; the vision tower and the decoder (a
routed one: its layers) are followed, as is what the causal LM makes of the decoder's output.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from llava_patch.core.compiled import aside, follow, following
from llava_patch.core.undo import UndoStack, holding
from llava_patch.hosts.anatomy import HF, Anatomy, when_loaded
from llava_patch.hosts.steps import around_calls

_packs: ContextVar[bool] = ContextVar("llava_patch_packs", default=False)


def attach(anatomy: Anatomy, undo: UndoStack) -> None:
    """Let a patched host be compiled without a graph for every batch; nothing changes where nothing is compiled.

    Modifications: the instance attributes `forward` of the vision model and, on HF, of the causal LM, of the inner
    LlavaModel and of the decoder; on `llava` `prepare_inputs_labels_for_multimodal`.
    """
    if anatomy.host == HF:
        undo.wrap(anatomy.model, "forward", around_calls(anatomy, _outer))
        undo.wrap(anatomy.wrapper, "forward", around_calls(anatomy, _inner, opens=False))
        undo.wrap(anatomy.decoder, "forward", around_calls(anatomy, _followed, opens=False))
    else:
        undo.wrap(anatomy.model, "prepare_inputs_labels_for_multimodal", _beside)
    when_loaded(anatomy, undo, lambda late: late.wrap(anatomy.vision_model, "forward", _followed))


@aside
def _beside(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


@aside
def _followed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return follow(function, *args, **kwargs)


class _Packed:
    """What the causal LM only hands on: torch looks at what is in a mapping, and at the class alone of this."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.result, name)


@aside
def _outer(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with holding(_packs, following()):
        output = follow(forward, *args, **kwargs)
    for name, value in output.items() if isinstance(output, dict) else ():
        if isinstance(value, _Packed):
            output[name] = value.result
    return output


@aside
def _inner(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The host's own, for `_outer` with the encoder's outputs packed (from 5.2x on): they hold a tensor an image."""
    output = forward(*args, **kwargs)
    for name, value in output.items() if _packs.get() and isinstance(output, dict) else ():
        if isinstance(value, dict):
            output[name] = _Packed(value)
    return output
