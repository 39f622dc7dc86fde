"""How decoder layers are called."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.core.compiled import follow_as, following, varies
from llava_patch.core.undo import UndoStack
from llava_patch.hosts.compat.features import parameters_of
from llava_patch.hosts.compat.positions import giving, looks_up, take_given
from llava_patch.hosts.zero import bare

_CHECKPOINTING, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"


def cache_argument() -> str:
    """What decoders call the KV cache that they are given: `past_key_values`, `cache` from 5.2x on."""
    argument = layer_cache_argument()
    return "past_key_values" if argument == "past_key_value" else argument


@functools.cache
def layer_cache_argument() -> str:
    """The same of their layers: `past_key_value` up to 4.55."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    names = ("cache", "past_key_values", "past_key_value")
    return next(name for name in names if name in parameters_of(LlamaDecoderLayer.forward))


def prepare_layers(decoder: Any, layers: Iterable[Any], undo: UndoStack) -> None:
    """Have layers of up to 4.52 take what `call_layer` gives them, and know of gradient checkpointing as later ones do.

    `decoder` is the one whose checkpointing they join, None where nobody switches it on.

    Modifications: where a layer's attention makes its own rotary embedding, the instance attribute `forward` of that;
    where the decoder checkpoints its layers, the layer's instance attributes `gradient_checkpointing` and
    `_gradient_checkpointing_func`, which transformers sets on whatever has them.
    """
    for layer in map(bare, layers):
        take_given(layer.self_attn, undo)
        if decoder is None or _checkpoints_itself(layer) or "gradient_checkpointing" in vars(layer):
            continue
        undo.set_attribute(layer, _CHECKPOINTING, bool(getattr(decoder, _CHECKPOINTING, False)))
        undo.set_attribute(layer, _FUNCTION, getattr(decoder, _FUNCTION, None))


def _checkpoints_itself(layer: Any) -> bool:
    """Whether a layer's own `__call__` does the gradient checkpointing (4.53 on)."""
    return _checkpointing_class(type(layer))  # type: ignore[arg-type]


@functools.cache
def _checkpointing_class(layer_class: type) -> bool:
    return any(kind.__name__ == "GradientCheckpointingLayer" for kind in layer_class.__mro__)


def call_layer(
    layer: Any, hidden_states: Tensor, *, cache: Any = None, checkpoint: bool = True, **arguments: Any
) -> Tensor:
    """Run one decoder layer: [batch, tokens, hidden] to the same.

    `arguments` are its forward's: `attention_mask` (what `causal_mask` returned), `position_embeddings` (rotary cos and
    sin, each [batch or 1, tokens, head_dim]), `position_ids` (of consecutive positions only: flash attention takes gaps
    for packed samples) and `use_cache`. Without `checkpoint`, gradient checkpointing is bypassed: where no gradient is
    wanted it would only warn, and it drops a cache.
    """
    if cache is not None:
        arguments[layer_cache_argument()] = cache
    own = bare(layer)
    if not _checkpoints_itself(own):
        run = functools.partial(_call_older, layer, arguments)
        return checkpointed(layer, run, hidden_states) if checkpoint else run(hidden_states)
    call = _compiled if following() else _plain
    if checkpoint or not getattr(own, "gradient_checkpointing", False):
        return call(layer, hidden_states, cache, checkpoint, arguments)
    own.gradient_checkpointing = False  # read by the layer's `__call__`, from 5.2x on by its `forward`
    try:
        return call(layer, hidden_states, cache, checkpoint, arguments)
    finally:
        own.gradient_checkpointing = True


def run_in_a_row(layers: list[Any]) -> bool:
    """Whether `call_layers` may be called: layers of 4.53 on, none checkpointing, no compiler around the patch."""
    if following() or not _checkpoints_itself(bare(layers[0])):
        return False
    return not any(layer.training and getattr(bare(layer), _CHECKPOINTING, False) for layer in layers)


def call_layers(
    layers: Iterable[Any],
    hidden_states: Tensor,
    *,
    cache: Any,
    attention_mask: Callable[[Any], Any],
    **arguments: Any,
) -> Tensor:
    """`call_layer` for several in a row, in evaluation and without gradients: [batch, tokens, hidden] to the same.

    `attention_mask` gives that of a layer; the other arguments are the same for all. What a host does between two of
    its layers is next to nothing, and so is this: a GPU waits for it where a batch is small.
    """
    if cache is not None:
        arguments[layer_cache_argument()] = cache
    config, mask = None, None
    for layer in layers:
        if (own := layer.self_attn.config) is not config:  # which says the backend; a decoder's layers share it
            config, mask = own, attention_mask(layer)
        hidden_states = layer_output(layer(hidden_states, attention_mask=mask, **arguments))
    return hidden_states


def _plain(layer: Any, hidden_states: Tensor, cache: Any, checkpoint: bool, arguments: dict[str, Any]) -> Tensor:
    return layer_output(layer(hidden_states, **arguments))


def _compiled(layer: Any, hidden_states: Tensor, cache: Any, checkpoint: bool, arguments: dict[str, Any]) -> Tensor:
    """The same, followed by the compiler that is at work around the patch."""
    for tensor in (hidden_states, *arguments.get("position_embeddings", ())):
        varies(tensor, 0, 1)
    for name in ("attention_mask", "position_ids", "cache_position"):
        varies(arguments.get(name), *range(getattr(arguments.get(name), "ndim", 0)))
    # What compiled layers have in common. With a cache that is nothing: a layer's number then is in its graph.
    number = None if getattr(cache, "cache", cache) is None else int(layer.self_attn.layer_idx)
    given = frozenset(name for name, value in arguments.items() if value is not None)
    role = (type(bare(layer)).__name__, checkpoint, given, number, torch.is_grad_enabled())
    return layer_output(follow_as(role, layer, hidden_states, **arguments))


def _call_older(layer: Any, arguments: dict[str, Any], hidden_states: Tensor) -> Tensor:
    """A layer that the decoder checkpoints (up to 4.52), which may look its rotary embedding up."""
    arguments = dict(arguments)
    if not looks_up(layer.self_attn):
        return layer_output(layer(hidden_states, **arguments))
    with giving(layer.self_attn, arguments.pop("position_embeddings"), arguments):
        return layer_output(layer(hidden_states, **arguments))


def layer_output(output: Any) -> Tensor:
    """Hidden states [batch, tokens, hidden] of what a decoder layer returns: a tuple up to 4.53, a tensor from 4.54."""
    return output[0] if isinstance(output, tuple) else output


def checkpointed(layer: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Call a function of tensors under a decoder layer's gradient checkpointing, where that is switched on.

    For calls that the layer's own checkpointing would break: it drops whatever is passed as a cache.
    """
    if getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled():
        return layer._gradient_checkpointing_func(function, *tensors)
    return function(*tensors)


def input_grads_are_forced(*modules: nn.Module) -> bool:
    """Whether `enable_input_require_grads` makes embeddings require a gradient that nobody reads."""
    hooks = [getattr(m, "_require_grads_hook", None) for m in modules]
    # `disable_input_require_grads` takes the hook away but leaves the attribute.
    return any(h is not None and h.id in (h.hooks_dict_ref() or {}) for h in hooks)
