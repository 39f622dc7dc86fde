"""Where torch.compile's graphs end on a patched host, and where they go on.

How many images a batch has, and where, is in the host's own Python between its image encoder and its decoder: graphs of
that would be made again for every number of images. It runs beside the graphs; the vision tower and the decoder (a
routed one: its layers) are followed, as is what the causal LM makes of the decoder's output.
"""

from collections.abc import Callable
from typing import Any

from llava_patch.core.compiled import aside, follow
from llava_patch.core.undo import UndoStack
from llava_patch.hosts.anatomy import HF, Anatomy, when_loaded


def attach(anatomy: Anatomy, undo: UndoStack) -> None:
    """Let a patched host be compiled without a graph for every batch; nothing changes where nothing is compiled.

    Modifications: the instance attributes `forward` of the vision model and, on HF, of the inner LlavaModel and of the
    decoder; on `llava` `prepare_inputs_labels_for_multimodal`.
    """
    if anatomy.host == HF:
        undo.wrap(anatomy.wrapper, "forward", _beside)
        undo.wrap(anatomy.decoder, "forward", _followed)
    else:
        undo.wrap(anatomy.model, "prepare_inputs_labels_for_multimodal", _beside)
    when_loaded(anatomy, undo, lambda late: late.wrap(anatomy.vision_model, "forward", _followed))


@aside
def _beside(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


@aside
def _followed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return follow(function, *args, **kwargs)
