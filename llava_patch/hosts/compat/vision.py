"""Vision models and image processors, and how a host encodes its images."""

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.core.undo import UndoStack


def encode_in_forward(model: Any, undo: UndoStack) -> None:
    """Have `generate` hand images to the model's forward, as it always did, instead of encoding them before (5.1x on).

    Only a call of the model knows where they are in its decoder's input.

    Modifications: the instance attributes `_supports_mm_encoder_outputs` and `_expand_inputs_for_generation`, where the
    class has the first.
    """
    if hasattr(model, "_supports_mm_encoder_outputs"):
        undo.set_attribute(model, "_supports_mm_encoder_outputs", lambda: False)
        undo.wrap(model, "_expand_inputs_for_generation", functools.partial(_expand_samples, model))


_VISUAL = {  # what brings each, one by one
    "image": ("pixel_values", "image_sizes"),
    "video": ("pixel_values_videos", "image_sizes_videos"),
}


def _expand_samples(
    model: Any,
    expand: Callable[..., tuple[Any, dict[str, Any]]],
    expand_size: int = 1,
    is_encoder_decoder: bool = False,
    input_ids: Any = None,
    **inputs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Repeat a batch for beams and return sequences, all images and videos of a sample with it.

    Of those that are not encoded yet the stock method repeats each where it stands, so that with several a sample some
    land in other samples' copies; in which order encoded ones come it knows.
    """
    moved: dict[str, Tensor] = {}
    for kind, names in _VISUAL.items():
        pixels = inputs.get(names[0])
        if expand_size > 1 and pixels is not None and not _one_each(model, kind, input_ids, pixels):
            order = _order_of_copies(model, kind, expand_size, input_ids, inputs)
            moved |= {name: inputs[name][order] for name in names if isinstance(inputs.get(name), Tensor)}
    ids, inputs = expand(expand_size, is_encoder_decoder, input_ids, **inputs)
    return ids, inputs | moved


def _order_of_copies(model: Any, kind: str, times: int, input_ids: Any, inputs: dict[str, Any]) -> list[int]:
    """Which image (or video) each place has where the batch is repeated sample by sample."""
    encode = getattr(model, f"get_{kind}_features")
    taken = inspect.signature(encode).parameters
    with torch.no_grad():
        encoded = encode(**{n: v for n, v in inputs.items() if n in taken and v is not None}, return_dict=True)
    numbers = [torch.full((len(features),), i) for i, features in enumerate(encoded.pooler_output)]
    stand_in = SimpleNamespace(pooler_output=numbers)
    model._expand_multimodal_outputs(input_ids, {kind: stand_in}, times, inputs.get("inputs_embeds"))
    return [int(number[0]) for number in stand_in.pooler_output]


def _one_each(model: Any, kind: str, input_ids: Any, pixels: Any) -> bool:
    if input_ids is None or len(pixels) != len(input_ids):
        return False
    return bool((input_ids == getattr(model.config, f"{kind}_token_id")).any(-1).all())


def ask_all_states(arguments: dict[str, Any]) -> None:
    """Have a vision model report every hidden state: from 5.2x on HF asks for those alone that it takes (in place)."""
    asked = arguments.get("output_hidden_states")
    if asked is not None and not isinstance(asked, bool):
        arguments["output_hidden_states"] = True


def ties_last_state(vision: nn.Module) -> bool:
    """Whether transformers' output recorder puts a vision model's last_hidden_state in its last block's place.

    Up to 4.57 it always does, so that what follows the blocks (a norm) is in it; from 5.0 on a class can tell it not
    to, in a variable of the decorator, and from 5.1x on a configuration.
    """
    name = "tie_last_hidden_states"
    told = getattr(getattr(vision, "config", None), name, None)
    if told is not None:
        return bool(told)
    for kind in type(vision).__mro__:
        forward = vars(kind).get("forward")
        while forward is not None:
            free = getattr(getattr(forward, "__code__", None), "co_freevars", ())
            if name in free:
                return bool(forward.__closure__[free.index(name)].cell_contents)
            forward = getattr(forward, "__wrapped__", None)
    return True


def pil_processor(name: str) -> Any:
    """An image processor's class by its name, the one that computes with PIL: from 5.1x on apart from torchvision's."""
    import transformers

    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


def one_tensor(features: Any) -> Tensor:
    """What a host's image encoder returned (up to transformers 4 maybe a list), one tensor [images, tokens, hidden]."""
    features = getattr(features, "pooler_output", features)
    return features if isinstance(features, Tensor) else torch.stack(list(features))


def known_options(processor: Any) -> frozenset[str]:
    """Names that an image processor's call takes; it warns about others and drops them.

    Slow processors name them in the signature of `preprocess`, fast ones in a TypedDict of the class.
    """
    fast = getattr(processor, "valid_kwargs", None)
    return frozenset(inspect.signature(processor.preprocess).parameters if fast is None else fast.__annotations__)


def layout_options(processor: Any) -> dict[str, str]:
    """What tells an image processor where a PIL image has its channels; {} where it knows.

    Slow processors make an array of it and guess: 1 or 3 rows of pixels would be taken for channels. Fast ones make a
    tensor with the channels first, and would believe anything else that they are told.
    """
    guesses = getattr(processor, "valid_kwargs", None) is None and "input_data_format" in known_options(processor)
    return {"input_data_format": "channels_last"} if guesses else {}
