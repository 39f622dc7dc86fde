"""Differences between versions of the hosts' packages, each found by feature rather than by version number.

Two parts. The first hides how transformers' decoder layers and masks are called. The second makes LLaVA's unmodified
training script and `generate` run on the versions that are supported, which are newer than the one it was written for:
each `fix_*` function names what broke and since when, and touches only code that would raise.
"""

import copy
import functools
import importlib.util
import inspect
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.core.compiled import follow_as, varies
from llava_patch.core.errors import HostError, InputError
from llava_patch.core.undo import UndoStack

logger = logging.getLogger("llava_patch")

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


def call_layer(layer: nn.Module, hidden_states: Tensor, *, checkpoint: bool = True, **arguments: Any) -> Tensor:
    """Run one decoder layer: [batch, tokens, hidden] to the same.

    `arguments` are its forward's: `attention_mask` (what `causal_mask` returned), `position_embeddings` (rotary cos and
    sin, each [batch or 1, tokens, head_dim]), `position_ids` (of consecutive positions only: flash attention takes gaps
    for packed samples), `past_key_values` with `cache_position` ([tokens], places in that cache) and `use_cache`.
    Without `checkpoint`, gradient checkpointing is bypassed where no gradient is wanted (it would only warn).
    """
    for tensor in (hidden_states, *arguments.get("position_embeddings", ())):
        varies(tensor, 0, 1)
    for name in ("attention_mask", "position_ids", "cache_position"):
        varies(arguments.get(name), *range(getattr(arguments.get(name), "ndim", 0)))
    past = arguments.get("past_key_values")
    # What compiled layers have in common. With a cache that is nothing: a layer's number then is in its graph.
    number = None if getattr(past, "cache", past) is None else int(layer.self_attn.layer_idx)
    given = frozenset(name for name, value in arguments.items() if value is not None)
    role = (type(layer).__name__, checkpoint, given, number, torch.is_grad_enabled())
    return follow_as(role, _run_layer, layer, checkpoint, hidden_states, arguments)


def _run_layer(layer: nn.Module, checkpoint: bool, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
    call = layer if checkpoint else functools.partial(nn.Module.__call__, layer)
    return layer_output(call(hidden_states, **arguments))


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


def one_tensor(features: Any) -> Tensor:
    """What a host's image encoder returned (up to transformers 4 maybe a list), one tensor [images, tokens, hidden]."""
    features = getattr(features, "pooler_output", features)
    return features if isinstance(features, Tensor) else torch.stack(list(features))


def stored_dtype(config: dict[str, Any]) -> str | None:
    """The precision that a config.json names: `torch_dtype` up to 4.55, `dtype` from 4.56."""
    return config.get("dtype", config.get("torch_dtype"))


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
    # Of the cache only the number of keys is asked.
    cache = SimpleNamespace(is_compileable=False, get_mask_sizes=lambda cache_position, layer_idx: (keys, 0))
    places = torch.arange(keys - queries, keys, device=hidden_states.device)
    return stock_mask(config, hidden_states, attention_mask=key_valid, cache_position=places, past_key_values=cache)


def sliding_window(config: Any) -> int | None:
    """How many positions back attention reaches, the query's own included; None: to the beginning."""
    return getattr(config, "sliding_window", None)


def stock_mask(config: Any, inputs_embeds: Tensor, **arguments: Any) -> Any:
    """The mask that the stock decoder would build for its forward's arguments (layers below the split must match it).

    They are `attention_mask`, `cache_position`, `past_key_values` and `position_ids`.
    """
    from transformers import masking_utils

    windowed = sliding_window(config) is not None
    make: Any = masking_utils.create_sliding_window_causal_mask if windowed else masking_utils.create_causal_mask
    return make(config=config, input_embeds=inputs_embeds, **arguments)


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


# --- LLaVA's own code on newer transformers ---------------------------------------------------------------------------


def fix_trainer_exports(trainer_module: ModuleType, undo: UndoStack) -> None:
    """`ALL_LAYERNORM_LAYERS` is no longer re-exported by transformers.trainer (4.5x); llava_trainer imports it."""
    if not hasattr(trainer_module, "ALL_LAYERNORM_LAYERS"):
        from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS

        undo.set_attribute(trainer_module, "ALL_LAYERNORM_LAYERS", ALL_LAYERNORM_LAYERS)


RENAMED_FLAGS = {"--evaluation_strategy": "--eval_strategy"}  # since 4.46


def fix_argv(argv: list[str]) -> None:
    """Rename flags of LLaVA's launch scripts that TrainingArguments has renamed, in place."""
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        argv[i] = RENAMED_FLAGS.get(flag, flag) + equals + value


def fix_trainer_methods(llava_trainer: ModuleType, undo: UndoStack) -> None:
    """LLaVATrainer overrides two Trainer methods with the signatures of 4.37."""
    from transformers import Trainer

    cls = llava_trainer.LLaVATrainer

    def without_data(sampler: Callable[..., Any], self: Any, train_dataset: Any = None) -> Any:
        return sampler(self)

    def without_metrics(save: Callable[..., None], self: Any, model: Any, trial: Any, metrics: Any = None) -> None:
        if not getattr(self.args, "tune_mm_mlp_adapter", False):
            save = Trainer._save_checkpoint
        save(self, model, trial)

    if "train_dataset" not in inspect.signature(cls._get_train_sampler).parameters:  # which is passed since 4.5x
        undo.wrap(cls, "_get_train_sampler", without_data)
    undo.wrap(cls, "_save_checkpoint", without_metrics)  # it hands on `metrics`, which are gone since 4.47


def fix_optimizer_groups(llava_trainer: ModuleType, undo: UndoStack) -> None:
    """LLaVATrainer makes optimizer groups that may be empty, and DeepSpeed drops those.

    Where biases and norms are frozen (a side branch alone has none that LLaVA exempts from decay), the learning-rate
    scheduler then counts more groups than the optimizer has, which raises since torch 2.13 (`zip(strict=True)`).
    Without DeepSpeed the groups stay as LLaVA makes them.
    """

    def without_empty(create: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = create(self, *args, **kwargs)
        if self.is_deepspeed_enabled:
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    undo.wrap(llava_trainer.LLaVATrainer, "create_optimizer", without_empty)


def load_renamed(model: Any, folder: Path) -> None:
    """Load what a Trainer that goes on from a checkpoint leaves out on HF (in place).

    `save_pretrained` writes a LLaVA's tensors under the names of older versions (transformers 4.52 to 4.57);
    `from_pretrained` translates them, but the Trainer's own loading does not, warns, and trains on with the weights
    that it was started with. With `save_safetensors=False` they lie in PyTorch's own files.
    """
    from llava_patch.core.weights import read_file  # a stock script loads this module, and nothing that patches

    mapping = getattr(model, "_checkpoint_conversion_mapping", None)
    if not mapping:
        return
    expected = set(model.state_dict())
    for path in sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin")):
        found = {}
        for tensor in read_file(path, whole=True):
            old = next((old for old in mapping if re.search(old, tensor.name)), None)
            if tensor.name not in expected and old is not None:
                found[re.sub(old, mapping[old], tensor.name)] = tensor()
        model.load_state_dict(found, strict=False)


def fix_zero3_dtypes(model: nn.Module, training_args: Any) -> None:
    """Give what LLaVA and peft make outside DeepSpeed ZeRO-3's reach the precision that the rest has (in place).

    With --bf16 or --fp16 the weights that ZeRO-3 partitions on loading have that type, but a new projector and LoRA's
    matrices are float32, and DeepSpeed stops at a mixture (`defragment` asserts one type, a product of two types
    raises). In stages 1 and 2 DeepSpeed casts the whole model itself; it keeps float32 master weights in every stage.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    dtype = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None
    if dtype is None or not is_deepspeed_zero3_enabled():
        return
    for parameter in model.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)


def fix_forward_arguments(cls: type, undo: UndoStack) -> None:
    """`generate` passes `cache_position` (4.38 on), which llava's forward does not take and does not need."""

    def without_places(forward: Callable[..., Any], *args: Any, cache_position: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    if "cache_position" not in inspect.signature(cls.forward).parameters:  # type: ignore[attr-defined]
        undo.wrap(cls, "forward", without_places)


def flash_fallback(kwargs: dict[str, Any]) -> None:
    """`train_mem.py` asks for flash_attention_2; without the package, use sdpa and say so (in place)."""
    if kwargs.get("attn_implementation") == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        logger.warning("flash_attention_2 was asked for but flash_attn is not installed: using sdpa")
        print("llava_patch: flash_attn is not installed; attention falls back to sdpa", file=sys.stderr)
        kwargs["attn_implementation"] = "sdpa"
