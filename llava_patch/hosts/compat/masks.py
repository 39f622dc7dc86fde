"""Attention backends and their masks."""

import copy
import functools
import importlib.util
import inspect
import sys
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llava_patch.core.errors import InputError
from llava_patch.core.undo import UndoStack
from llava_patch.hosts.compat.features import parameters_of
from llava_patch.hosts.zero import bare


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
    used = getattr(config, "use_sliding_window", True)  # Qwen2's, which keeps the number all the same up to 4.4x
    return getattr(config, "sliding_window", None) if used else None


@functools.cache
def makes_windows() -> bool:
    """Whether every backend's mask has the sliding window (4.53 on): before, some backends' have and some have not."""
    return importlib.util.find_spec("transformers.masking_utils") is not None


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
    if not makes_windows():
        return _older_mask(config, inputs_embeds, attention_mask, seen or 0)
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


def _older_mask(config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, seen: int) -> Any:
    """The mask of up to 4.52: additive, or for flash attention [batch, earlier and new tokens]."""
    from transformers import modeling_attn_mask_utils as makers

    backend, shape = attention_of(config), tuple(inputs_embeds.shape[:2])
    padded = attention_mask is not None and not bool(attention_mask.all())
    if backend.startswith("flash_attention"):
        return attention_mask if padded else None
    if padded and seen and shape[1] > 1:  # where 4.37 takes a query's row for its place
        places = torch.arange(seen + shape[1], device=inputs_embeds.device).expand(shape[0], -1)
        assert attention_mask is not None
        return position_mask(config, places[:, seen:], places, attention_mask.bool(), inputs_embeds.dtype)
    if backend == "sdpa":
        mask = makers._prepare_4d_causal_attention_mask_for_sdpa(attention_mask, shape, inputs_embeds, seen)
        if mask is not None or _none_is_causal(type(config)):  # type: ignore[arg-type]
            return mask
    return makers._prepare_4d_causal_attention_mask(attention_mask, shape, inputs_embeds, seen)


@functools.cache
def _none_is_causal(config_class: type) -> bool:
    """Whether a decoder's sdpa attention is causal without a mask: Llama's of 4.38 and 4.39 then sees every key."""
    for kind in config_class.__mro__:
        module = sys.modules.get(kind.__module__.replace(".configuration_", ".modeling_"))
        sdpa = _classes_in(module).get("sdpa")
        if sdpa is not None:
            code = inspect.unwrap(sdpa.forward).__code__  # type: ignore[attr-defined]
            return "is_causal" in (*code.co_names, *code.co_varnames, *_keywords(code))
    return True


def _keywords(code: CodeType) -> list[str]:
    """Names that a function's code passes arguments by."""
    return [name for names in code.co_consts if isinstance(names, tuple) for name in names]


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

    It is additive in `dtype`, the hidden states': sdpa would turn a bool one into just this, once a layer. The other
    arguments are those of `visible`.
    """
    allowed = visible(config, query_index, key_index, key_valid)
    if key_valid is not None:
        # A query that is padding may see nothing; let it see itself, so that no row is empty.
        allowed |= query_index[:, :, None] == key_index[:, None]
    allowed = allowed[:, None]
    nothing = torch.finfo(dtype).min if attention_of(config) == "eager" else float("-inf")
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, nothing)


def attention_of(config: Any) -> str:
    """The attention backend in use: "eager", "sdpa", or a flash attention's name; InputError for one without masks."""
    name = config._attn_implementation or "eager"
    if name in ("eager", "sdpa") or name.startswith("flash_attention"):
        return name
    raise InputError(
        f'attn_implementation = "{name}" is not available with routing: use "sdpa", "flash_attention_2" or "eager"'
    )


def _classes_of(attention: Any) -> dict[str, type]:
    """The classes that a decoder's attention has for its backends (up to 4.47); {} where one serves them all."""
    return _classes_in(sys.modules[type(attention).__module__])


@functools.cache  # asked once a layer and call
def _classes_in(module: ModuleType | None) -> dict[str, type]:
    named = {} if module is None else vars(module)
    return next((value for name, value in named.items() if name.endswith("_ATTENTION_CLASSES")), {})


def backend_of(attention: Any) -> str:
    """`attention_of` for one attention module: up to 4.47 its class says it, whatever its config has become since."""
    attention = bare(attention)
    names = {kind: name for name, kind in _classes_of(attention).items()}
    found = next((names[kind] for kind in type(attention).__mro__ if kind in names), None)
    return attention_of(attention.config) if found is None else found


def use_backend(attention: Any, name: str, undo: UndoStack) -> None:
    """Make an attention module one of another backend, where its class says which it is of; else its config does.

    Modifications: the module's class.
    """
    attention = bare(attention)
    before = type(attention)
    if name in (classes := _classes_of(attention)):
        attention.__class__ = classes[name]
        undo.push(lambda: setattr(attention, "__class__", before))


def choose_backend_again(config: Any) -> None:
    """Have transformers choose the attention backend of a configuration that was read from a file (in place).

    4.46 to 4.52 note there that they have chosen one, but not which, and then take it for eager.
    """
    vars(config).pop("_attn_implementation_autoset", None)


def scaling(attention: Any) -> float:
    """The factor on q.k before the softmax, which an attention module does not hold up to 4.47."""
    return float(getattr(attention, "scaling", attention.head_dim**-0.5))


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

    Modifications: the module's instance attribute `config`, or its class where that says the backend.
    """
    if _classes_of(attention):
        if backend_of(attention).startswith("flash_attention"):
            use_backend(attention, "sdpa", undo)
    elif not isinstance(attention.config, _MaskedAttentionConfig):
        undo.set_attribute(attention, "config", _MaskedAttentionConfig(attention.config))
