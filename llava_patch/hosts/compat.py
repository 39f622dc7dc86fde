"""Differences between versions of transformers, each found by feature rather than by version number.

How decoder layers, masks and caches are called, and what tensors and settings are named. What makes LLaVA's own code
run on the supported versions is in `llava_code`.
"""

import copy
import functools
import inspect
import logging
import re
from collections.abc import Callable, Collection, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llava_patch.core.compiled import follow_as, varies
from llava_patch.core.errors import HostError, InputError
from llava_patch.core.undo import UndoStack

logger = logging.getLogger("llava_patch")
T = TypeVar("T")

SUPPORTED_TRANSFORMERS = ("4.57", "5.25")
"""Lowest supported version (inclusive) and first unsupported one (exclusive)."""


def unsupported() -> str | None:
    """Why nothing can be patched on the installed versions; None where it can."""
    import transformers
    from packaging.version import Version

    low, high = SUPPORTED_TRANSFORMERS
    if Version(low) <= Version(transformers.__version__) < Version(high):
        return None
    return (
        f"transformers {transformers.__version__} is outside the supported range >={low},<{high}; "
        f"install one that is, for example: pip install 'transformers=={low}.*'"
    )


def check_versions() -> None:
    """Refuse host versions that llava_patch was never run on, with the command that mends it (HostError)."""
    if (reason := unsupported()) is not None:
        raise HostError(reason)


def brings_towers(builder: ModuleType) -> bool:
    """Whether a `llava` package, by its module of `build_vision_tower`, has towers besides CLIP, as LLaVA-NeXT's."""
    package = builder.__name__.partition(".")[0]
    classes = [c for c in vars(builder).values() if isinstance(c, type) and c.__module__.partition(".")[0] == package]
    return any(not c.__name__.startswith("CLIPVisionTower") for c in classes)


# --- calling decoder layers -------------------------------------------------------------------------------------------


@functools.cache
def parameters_of(function: Callable[..., Any]) -> frozenset[str]:
    """Names that a function takes."""
    return frozenset(inspect.signature(function).parameters)


def cache_argument() -> str:
    """What decoders and their layers call the KV cache that they are given: `past_key_values`, `cache` from 5.2x on."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    return "cache" if "cache" in parameters_of(LlamaDecoderLayer.forward) else "past_key_values"


def to_forget(asked: int, held: int) -> int:
    """How many of the `held` positions the argument of a cache's `crop` tells to forget.

    A negative number always says how many; else it says how many to keep, up to 5.1x. Since then 0 means none, and
    stock caches refuse a positive one, which still speaks for itself.
    """
    from transformers.cache_utils import DynamicCache

    if asked < 0 or (asked == 0 and "tokens_to_remove" in parameters_of(DynamicCache.crop)):
        return min(-asked, held)
    return max(held - asked, 0)


def encode_in_forward(model: Any, undo: UndoStack) -> None:
    """Have `generate` hand images to the model's forward, as it always did, instead of encoding them before (5.1x on).

    Only a call of the model knows where they are in its decoder's input.

    Modifications: the instance attributes `_supports_mm_encoder_outputs` and `_expand_inputs_for_generation`, where the
    class has the first.
    """
    if hasattr(model, "_supports_mm_encoder_outputs"):
        undo.set_attribute(model, "_supports_mm_encoder_outputs", lambda: False)
        undo.wrap(model, "_expand_inputs_for_generation", functools.partial(_expand_samples, model))


def _expand_samples(
    model: Any,
    expand: Callable[..., tuple[Any, dict[str, Any]]],
    expand_size: int = 1,
    is_encoder_decoder: bool = False,
    input_ids: Any = None,
    **inputs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Repeat a batch for beams and return sequences, all images of a sample with it.

    Of images that are not encoded yet the stock method repeats each where it stands, so that with several a sample some
    land in other samples' copies; in which order encoded ones come it knows.
    """
    pixels, order = inputs.get("pixel_values"), None
    if expand_size > 1 and pixels is not None and not _one_image_each(model, input_ids, pixels):
        with torch.no_grad():
            encoded = model.get_image_features(pixels, image_sizes=inputs.get("image_sizes"), return_dict=True)
        numbers = [torch.full((len(features),), i) for i, features in enumerate(encoded.pooler_output)]
        stand_in, embeds = SimpleNamespace(pooler_output=numbers), inputs.get("inputs_embeds")
        model._expand_multimodal_outputs(input_ids, {"image": stand_in}, expand_size, embeds)
        order = [int(number[0]) for number in stand_in.pooler_output]
    images = {name: inputs.get(name) for name in ("pixel_values", "image_sizes")}
    ids, inputs = expand(expand_size, is_encoder_decoder, input_ids, **inputs)
    if order is not None:
        inputs |= {name: value[order] for name, value in images.items() if isinstance(value, Tensor)}
    return ids, inputs


def _one_image_each(model: Any, input_ids: Any, pixels: Any) -> bool:
    if input_ids is None or len(pixels) != len(input_ids):
        return False
    return bool((input_ids == model.config.image_token_id).any(-1).all())


def ask_all_states(arguments: dict[str, Any]) -> None:
    """Have a vision model report every hidden state: from 5.2x on HF asks for those alone that it takes (in place)."""
    asked = arguments.get("output_hidden_states")
    if asked is not None and not isinstance(asked, bool):
        arguments["output_hidden_states"] = True


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
        arguments[cache_argument()] = cache
    for tensor in (hidden_states, *arguments.get("position_embeddings", ())):
        varies(tensor, 0, 1)
    for name in ("attention_mask", "position_ids", "cache_position"):
        varies(arguments.get(name), *range(getattr(arguments.get(name), "ndim", 0)))
    # What compiled layers have in common. With a cache that is nothing: a layer's number then is in its graph.
    number = None if getattr(cache, "cache", cache) is None else int(layer.self_attn.layer_idx)
    given = frozenset(name for name, value in arguments.items() if value is not None)
    role = (type(layer).__name__, checkpoint, given, number, torch.is_grad_enabled())
    if checkpoint or not getattr(layer, "gradient_checkpointing", False):
        return layer_output(follow_as(role, layer, hidden_states, **arguments))
    layer.gradient_checkpointing = False  # read by the layer's `__call__`, from 5.2x on by its `forward`
    try:
        return layer_output(follow_as(role, layer, hidden_states, **arguments))
    finally:
        layer.gradient_checkpointing = True


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


def stored_dtype(config: dict[str, Any]) -> str | None:
    """The precision that a config.json names: `torch_dtype` up to 4.55, `dtype` from 4.56."""
    return config.get("dtype", config.get("torch_dtype"))


def as_here(named: Mapping[str, T], known: Collection[str]) -> dict[str, T]:
    """The same under the names that a model has on this version: CLIP lost a level, `vision_model`, with 5.0."""
    return {_name_here(name, known): value for name, value in named.items()}


def _name_here(name: str, known: Collection[str]) -> str:
    below = name.rpartition("vision_tower.")[2]
    other = below.removeprefix("vision_model.") if below.startswith("vision_model.") else f"vision_model.{below}"
    other = name.removesuffix(below) + other
    return other if name not in known and other in known else name


def neutral_tower(name: str) -> str:
    """The neutral spelling of a tensor of a tower's own files, which is the same on every version."""
    return "tower." + name.removeprefix("vision_model.")


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


def causal_mask(
    config: Any,  # the decoder's; its `_attn_implementation` picks the form
    hidden_states: Tensor,  # [batch, queries, hidden]; only shape, dtype and device are read
    key_valid: Tensor | None = None,  # bool [batch, keys], False at padding; None when every key is valid
    kv_length: int | None = None,  # number of keys, queries included; None: as many as queries
    attn_implementation: str | None = None,  # another backend than the configured one
) -> Any:
    """Causal mask in the form that the configured attention backend takes; None where plain causality suffices."""
    queries = hidden_states.shape[1]
    keys = queries if kv_length is None else kv_length
    if attn_implementation is not None and attn_implementation != config._attn_implementation:
        config = copy.copy(config)
        config._attn_implementation = attn_implementation
    return stock_mask(config, hidden_states, attention_mask=key_valid, seen=keys - queries)


def sliding_window(config: Any) -> int | None:
    """How many positions back attention reaches, the query's own included; None: to the beginning."""
    return getattr(config, "sliding_window", None)


def stock_mask(
    config: Any,
    inputs_embeds: Tensor,  # [batch, queries, hidden]
    *,
    attention_mask: Tensor | None,  # [batch, earlier and new tokens]
    seen: int | None,  # how many earlier tokens the cache holds; None: there is no cache
    cache_position: Tensor | None = None,  # int64 [queries], where the caller says it
    position_ids: Tensor | None = None,  # int64 [batch or 1, queries]
) -> Any:
    """The mask that the stock decoder would build for the same arguments (layers below the split must match it)."""
    from transformers import masking_utils

    windowed = sliding_window(config) is not None
    make: Any = masking_utils.create_sliding_window_causal_mask if windowed else masking_utils.create_causal_mask
    cache, named = None, parameters_of(make)
    if seen is not None:  # of a cache only numbers of positions are asked
        keys = seen + inputs_embeds.shape[1]
        cache = SimpleNamespace(
            is_compileable=False, get_mask_sizes=lambda *_: (keys, 0), get_seq_length=lambda *_: seen,
            get_query_offset=lambda *_: seen,
        )  # fmt: skip
    arguments = {"cache" if "cache" in named else "past_key_values": cache, "position_ids": position_ids}
    if "cache_position" in named:  # up to 5.x; then the cache says where the queries are
        start, count = seen or 0, inputs_embeds.shape[1]
        places = torch.arange(start, start + count, device=inputs_embeds.device)
        arguments["cache_position"] = places if cache_position is None else cache_position
    return make(config, inputs_embeds, attention_mask, **arguments)


def visible(config: Any, query_index: Tensor, key_index: Tensor, key_valid: Tensor | None) -> Tensor:
    """Which keys a causal query sees, by their places in the sequence: bool [batch, queries, keys].

    The places are int64 [batch, queries] and [batch, keys]; `key_valid` is as in `causal_mask`. A sliding window counts
    positions of the whole sequence, those that a layer does not see included.
    """
    distance = query_index[:, :, None] - key_index[:, None]
    seen = distance >= 0
    if (window := sliding_window(config)) is not None:
        seen &= distance < window
    return seen if key_valid is None else seen & key_valid[:, None]


def position_mask(
    config: Any, query_index: Tensor, key_index: Tensor, key_valid: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Causal mask between positions in any order, for sdpa and eager attention: [batch, 1, queries, keys].

    It is bool (sdpa) or additive in `dtype`, the hidden states' (eager); the other arguments are those of `visible`.
    """
    allowed = visible(config, query_index, key_index, key_valid)
    if key_valid is not None:
        # A query that is padding may see nothing; let it see itself, so that no row is empty.
        allowed |= query_index[:, :, None] == key_index[:, None]
    allowed = allowed[:, None]
    if attention_of(config) == "eager":
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    return allowed


def attention_of(config: Any) -> str:
    """The attention backend in use: "eager", "sdpa", or a flash attention's name; InputError for one without masks."""
    name = config._attn_implementation or "eager"
    if name in ("eager", "sdpa") or name.startswith("flash_attention"):
        return name
    raise InputError(
        f'attn_implementation = "{name}" is not available with routing: use "sdpa", "flash_attention_2" or "eager"'
    )


class _MaskedAttentionConfig:
    """A decoder configuration whose attention backend takes any mask: sdpa where flash attention is configured."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name == "_config" or name.startswith("__"):  # copying asks before there is one
            raise AttributeError(name)
        value = getattr(self._config, name)
        if name == "_attn_implementation" and str(value).startswith("flash_attention"):
            return "sdpa"
        return value


def allow_any_mask(attention: Any, undo: UndoStack) -> None:
    """Let an attention module run sdpa where the model runs flash attention, which knows only causal masks.

    Modifications: the module's instance attribute `config`.
    """
    if not isinstance(attention.config, _MaskedAttentionConfig):
        undo.set_attribute(attention, "config", _MaskedAttentionConfig(attention.config))


def input_grads_are_forced(*modules: nn.Module) -> bool:
    """Whether `enable_input_require_grads` makes embeddings require a gradient that nobody reads."""
    hooks = [getattr(m, "_require_grads_hook", None) for m in modules]
    # `disable_input_require_grads` takes the hook away but leaves the attribute.
    return any(h is not None and h.id in (h.hooks_dict_ref() or {}) for h in hooks)


def load_saved_names(model: nn.Module, undo: UndoStack) -> None:
    """Let a model's `load_state_dict` take its tensors under the names that its own `save_pretrained` writes.

    On HF that writes a LLaVA's tensors under the names of older versions (4.52 on); `from_pretrained` translates them,
    but a Trainer that goes on from a checkpoint, or loads the best one, only warns, and keeps the weights it has.

    Modifications: a load_state_dict pre-hook.
    """

    def translate(state: dict[str, Any], prefix: str, *_: Any) -> None:
        own = {n for named in (model.named_parameters, model.named_buffers) for n, _ in named(remove_duplicate=False)}
        given = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
        for saved, name in _saved_names(model, given - own, own - given).items():
            state[prefix + name] = state.pop(prefix + saved)

    undo.push(model._register_load_state_dict_pre_hook(translate).remove)


def saves_offloaded(model: Any) -> bool:
    """Whether a model's `save_pretrained` brings in what is offloaded: where a device_map of several places did it.

    Where it writes tensors under names of older versions by a list in the class (HF's LLaVA up to 5.0), it looks those
    names up in the model, which has none such.
    """
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    return len(places) > 1 and not getattr(model, "_checkpoint_conversion_mapping", None)


def _saved_names(model: Any, unknown: Collection[str], wanted: Collection[str]) -> dict[str, str]:
    """Which of the unknown names `save_pretrained` writes for which wanted ones."""
    if not unknown or not wanted:
        return {}
    names = sorted(wanted)
    try:
        from transformers.core_model_loading import revert_weight_conversion  # since 5.0
    except ImportError:
        mapping = getattr(model, "_checkpoint_conversion_mapping", None) or {}
        found = {
            name: next((re.sub(o, n, name) for o, n in mapping.items() if re.search(o, name)), "") for name in unknown
        }
    else:
        saved = revert_weight_conversion(model, {name: torch.tensor(i) for i, name in enumerate(names)})
        found = {name: names[int(place)] for name, place in saved.items()}
    return {saved: name for saved, name in found.items() if saved in unknown and name in wanted}


def keep_floating(names: Callable[[Callable[[Any], list[str]], Any, bool], list[str]], undo: UndoStack) -> None:
    """Say which modules transformers leaves in floating point when it quantises a model that it loads.

    `names` gets what names those that it leaves out itself or the user's llm_int8_skip_modules say, the model, and
    whether its files are quantised already.

    Modifications: the static method `get_modules_to_not_convert` of its quantizers' base.
    """
    from transformers.quantizers.base import HfQuantizer

    stock = HfQuantizer.get_modules_to_not_convert

    def all_names(self: Any, model: Any, *args: Any, **kwargs: Any) -> list[str]:
        return names(lambda model: stock(model, *args, **kwargs), model, bool(self.pre_quantized))

    undo.set_attribute(HfQuantizer, "get_modules_to_not_convert", all_names)
