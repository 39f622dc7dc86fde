"""LLaVA's unmodified training script, loader and `generate` on the versions of transformers that are supported.

They are newer than the one that LLaVA was written for. Each function names what broke and since when, found by feature,
and touches only code that would raise, or would silently do something else than it did.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import json
import logging
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from llava_patch.core.errors import HostError
from llava_patch.core.undo import UndoStack, meanwhile
from llava_patch.hosts.compat import cache_argument, parameters_of

_RESAMPLER = "mm_vision_resampler"
_FSDP_LAYER = "fsdp_transformer_layer_cls_to_wrap"
logger = logging.getLogger("llava_patch")


def fix_trainer_exports(trainer_module: ModuleType, undo: UndoStack) -> None:
    """What transformers.trainer no longer re-exports (4.5x) and llava_trainer imports from it."""
    for module, name in (
        ("transformers.pytorch_utils", "ALL_LAYERNORM_LAYERS"),
        ("accelerate.utils", "GradientAccumulationPlugin"),  # LLaVA-NeXT's
    ):
        if not hasattr(trainer_module, name):
            undo.set_attribute(trainer_module, name, getattr(importlib.import_module(module), name))


def fix_model_exports(modeling_utils: ModuleType, undo: UndoStack) -> None:
    """LLaVA-NeXT's Q-Former imports three functions from transformers.modeling_utils, which left it (4.4x on).

    One of them, `find_pruneable_heads_and_indices`, is gone altogether (5.x); nothing of LLaVA-NeXT's calls it.
    """
    from transformers import pytorch_utils

    def gone(*args: Any, **kwargs: Any) -> Any:
        raise HostError("find_pruneable_heads_and_indices: this version of transformers does not prune heads any more")

    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        if not hasattr(modeling_utils, name):
            undo.set_attribute(modeling_utils, name, getattr(pytorch_utils, name, gone))


def fix_argv(argv: list[str]) -> None:
    """Write flags of LLaVA's launch scripts as TrainingArguments takes them now, where it has dropped them (in place).

    `--evaluation_strategy` is `--eval_strategy` since 4.46. Since 5.0 `--no_cuda` is `--use_cpu`, `--group_by_length` a
    sampling strategy, and a share of the steps is a `--warmup_steps` below 1 instead of `--warmup_ratio`, which
    counted beside 0 steps only; FSDP's layers go into `--fsdp_config`, without which `--fsdp` is FSDP2 from 5.10 on.
    """
    from transformers import TrainingArguments
    from transformers.hf_argparser import string_to_bool

    known = {field.name: field.type for field in dataclasses.fields(TrainingArguments)}
    starts = [i for i, word in enumerate(argv) if word.startswith("--")]
    found = []
    for start, end in zip(starts, [*starts[1:], len(argv)], strict=False):
        flag, equals, value = argv[start].partition("=")
        found.append((start, end, flag[2:].replace("-", "_"), [value] * bool(equals) + argv[start + 1 : end]))
    given = {name: values for *_, name, values in found}  # of two, the later counts
    grouped = all(map(string_to_bool, given.get("group_by_length", [])))
    now = {
        "evaluation_strategy": ["--eval_strategy", *given.get("evaluation_strategy", [])],
        "no_cuda": ["--use_cpu", *given.get("no_cuda", [])],
        "group_by_length": ["--train_sampling_strategy", "group_by_length" if grouped else "random"],
    }
    now = {name: words for name, words in now.items() if name not in known}
    if "warmup_ratio" in given and known["warmup_steps"] is not int:
        warmup = ["--warmup_steps", *_warmup(given.get("warmup_steps") or ["0"], given["warmup_ratio"])]
        now |= {"warmup_ratio": warmup, "warmup_steps": warmup}
    if _FSDP_LAYER not in known and "fsdp_config" not in given:
        wrapped = {"transformer_layer_cls_to_wrap": given[_FSDP_LAYER]} if _FSDP_LAYER in given else {}
        config = ["--fsdp_config", json.dumps({"version": 1, **wrapped})]
        if wrapped:
            now[_FSDP_LAYER] = config
        elif any(given.get("fsdp", [])):
            now["fsdp"] = ["--fsdp", *given["fsdp"], *config]
    for start, end, name, _ in reversed(found):
        argv[start:end] = now.get(name, argv[start:end])


def fsdp_options(given: Any) -> Any:
    """What --fsdp says, of which llava takes the length: from 5.10 on it has become True."""
    return ["full_shard"] if given is True else given


def _warmup(steps: list[str], ratio: list[str]) -> list[str]:
    """The value of a flag that takes steps or, below 1, a share of all."""
    if float(steps[0]) > 0:
        return steps
    whole = math.nextafter(1, 0)  # 1 itself is one step; of any number of steps this share is rounded up to all of them
    return [str(whole) if float(word) == 1 else word for word in ratio]


def fix_trainer_methods(llava_trainer: ModuleType, undo: UndoStack) -> None:
    """LLaVATrainer overrides two Trainer methods with the signatures of 4.37, and is made with that `tokenizer`."""
    from transformers import Trainer

    cls = llava_trainer.LLaVATrainer

    def without_data(sampler: Callable[..., Any], self: Any, train_dataset: Any = None) -> Any:
        if not hasattr(self.args, "group_by_length"):  # in 5.0 a sampling strategy; LLaVA-NeXT's asks for it first
            self.args.group_by_length = self.args.train_sampling_strategy == "group_by_length"
        return sampler(self)

    def without_metrics(save: Callable[..., None], self: Any, model: Any, trial: Any, metrics: Any = None) -> None:
        if not saves_projector_alone(self.args):
            save = Trainer._save_checkpoint
        save(self, model, trial)

    def with_processing_class(init: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        if "tokenizer" in kwargs:
            kwargs["processing_class"] = kwargs.pop("tokenizer")
        init(self, *args, **kwargs)

    if "train_dataset" not in inspect.signature(cls._get_train_sampler).parameters:  # which is passed since 4.5x
        undo.wrap(cls, "_get_train_sampler", without_data)
    if "metrics" not in inspect.signature(Trainer._save_checkpoint).parameters:  # it hands them on; gone since 4.47
        undo.wrap(cls, "_save_checkpoint", without_metrics)
    accepted = inspect.signature(Trainer.__init__, follow_wrapped=False).parameters.values()
    if not any(one.name == "tokenizer" or one.kind is one.VAR_KEYWORD for one in accepted):  # from 5.0 on
        undo.wrap(cls, "__init__", with_processing_class)


def saves_projector_alone(training_args: Any) -> bool:
    """Whether LLaVA's Trainer saves the projector and nothing else: stage 1, as LLaVA or LLaVA-NeXT says it."""
    if hasattr(training_args, "mm_vision_tower_lr") and getattr(training_args, "lora_enable", False):
        return False  # LLaVA-NeXT then saves peft's files
    parts = tunable_parts(training_args)
    return bool(getattr(training_args, "tune_mm_mlp_adapter", False)) or parts in (["mm_mlp_adapter"], [_RESAMPLER])


def tunable_parts(training_args: Any) -> list[str]:
    """What LLaVA-NeXT's --mm_tunable_parts lets train; [] without it."""
    asked = getattr(training_args, "mm_tunable_parts", None) or ""
    return [part.strip() for part in asked.split(",") if part.strip()]


def fix_training_loop(llava_trainer: ModuleType, undo: UndoStack) -> None:
    """LLaVA-NeXT's Trainer makes its accelerator and runs its loop by copies of transformers' methods.

    The first reads arguments of 4.40 (`dispatch_batches`) that are gone; the second, from its revision 45f2d92 on,
    names that its module does not have, so that it raises on every version. Where they would, the Trainer's own methods
    run, of which they are copies; `--trainer_mode zo`, which is in the copy alone, is refused.
    """
    from transformers import Trainer, TrainingArguments

    cls = llava_trainer.LLaVATrainer
    given = {field.name for field in dataclasses.fields(TrainingArguments)}

    def make_accelerator(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        Trainer.create_accelerator_and_postprocess(self, *args, **kwargs)

    def run(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "trainer_mode", "regular") != "regular":
            raise HostError(f"--trainer_mode {self.trainer_mode} does not run on the installed versions")
        return Trainer._inner_training_loop(self, *args, **kwargs)

    if "create_accelerator_and_postprocess" in vars(cls) and "dispatch_batches" not in given:
        undo.wrap(cls, "create_accelerator_and_postprocess", make_accelerator)
    loop = vars(cls).get("_inner_training_loop")
    if loop is not None and not hasattr(llava_trainer, "TrainerState"):
        undo.wrap(cls, "_inner_training_loop", run)


def fix_optimizer_groups(llava_trainer: ModuleType, undo: UndoStack) -> None:
    """LLaVATrainer makes optimizer groups that may be empty, and DeepSpeed drops those.

    Where biases and norms are frozen (a side branch alone has none that LLaVA exempts from decay), the learning-rate
    scheduler then counts more groups than the optimizer has, which raises since torch 2.13 (`zip(strict=True)`).
    Without DeepSpeed the groups stay as LLaVA makes them. Under FSDP the model that it wraps is handed over as an
    argument (5.1x on), which before was the Trainer's own, where LLaVATrainer looks for it.
    """

    def without_empty(create: Callable[..., Any], self: Any, model: Any = None) -> Any:
        with contextlib.nullcontext() if model is None else meanwhile(self, model=model):
            optimizer = create(self)
        if self.is_deepspeed_enabled:
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    undo.wrap(llava_trainer.LLaVATrainer, "create_optimizer", without_empty)


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
    """`generate` passes what llava's methods do not take: `cache_position` (4.38 to 5.x), and `cache` (5.2x on).

    The first they do not need, the second they know as `past_key_values`.
    """

    def with_old_names(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if "cache" in kwargs:
            kwargs["past_key_values"] = kwargs.pop("cache")
        return method(*args, **kwargs)

    def without_places(forward: Callable[..., Any], *args: Any, cache_position: Any = None, **kwargs: Any) -> Any:
        return with_old_names(forward, *args, **kwargs)

    old, kind = cache_argument() == "cache", cast(Any, cls)
    if "cache_position" not in parameters_of(kind.forward):
        undo.wrap(cls, "forward", without_places)
    elif old and "cache" not in parameters_of(kind.forward):
        undo.wrap(cls, "forward", with_old_names)
    if old and "cache" not in parameters_of(getattr(kind, "prepare_inputs_for_generation", with_old_names)):
        undo.wrap(cls, "prepare_inputs_for_generation", with_old_names)


def fix_rope_scaling(config_class: Any, undo: UndoStack) -> None:
    """LLaVA-NeXT's Qwen sets `config.rope_scaling = None`: no scaling, which in 5.x would also drop the base.

    There it is another name of `rope_parameters`, which hold both.
    """
    alias = getattr(config_class, "rope_scaling", None)
    if not isinstance(alias, property):
        return
    standard = cast(Callable[[Any, Any], None], alias.fset)

    def set_scaling(self: Any, value: Any) -> None:
        before = self.rope_parameters or {}
        if value is None and "rope_theta" in before:
            value = {"rope_type": "default", "rope_theta": before["rope_theta"]}
        standard(self, value)

    undo.set_attribute(config_class, "rope_scaling", property(alias.fget, set_scaling))


def fix_tower_loading(llava_arch: ModuleType, undo: UndoStack) -> None:
    """LLaVA-NeXT loads its tower while the whole model is made on the meta device, where 5.x refuses to load anything.

    The tower is loaded outside of it, as up to 4.57; a checkpoint that has the tower's weights is loaded into it then.
    """

    def build(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return original(*args, **kwargs)

    if importlib.util.find_spec("transformers.core_model_loading") is not None:  # since 5.0
        undo.wrap(llava_arch, "build_vision_tower", build)


def fix_siglip(module: Any, undo: UndoStack) -> None:
    """LLaVA-NeXT's SigLIP on 5.x: a helper of its configuration's is gone, and loading leaves its places unset.

    The helper renames an argument that nobody passes any more; the table counts from 0, and is in no checkpoint.
    """
    if hasattr(module.SigLipVisionConfig, "_set_token_in_kwargs"):
        return
    undo.set_attribute(module.SigLipVisionConfig, "_set_token_in_kwargs", staticmethod(lambda kwargs: None))

    def load(load_model: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        loaded = self.is_loaded
        load_model(self, *args, **kwargs)
        table = self.vision_tower.vision_model.embeddings.position_ids
        if not loaded and not table.is_meta:
            table.copy_(torch.arange(table.shape[-1]))

    undo.wrap(module.SigLipVisionTower, "load_model", load)


def fix_llama_tokenizer(cls: Any, undo: UndoStack) -> None:
    """Read Vicuna's tokenizer as it was before 5.0, where a checkpoint that names no `legacy` had it True.

    5.x takes False, splits the text after "</s>" into other tokens, and LLaVA masks all labels of a conversation with a
    second answer ("tokenization mismatch"). Nor does it save the setting, so that a tokenizer that was trained with
    True would come back with False: it is saved; what 5.x has saved without it is read as 5.x reads it.
    """

    def with_legacy(init: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("legacy") is None:
            kwargs["legacy"] = "backend" not in kwargs  # which 5.x writes
        init(self, *args, **kwargs)
        self.init_kwargs["legacy"] = self.legacy

    parameter = inspect.signature(cls.__init__).parameters.get("legacy")
    if parameter is not None and parameter.default is False:
        undo.wrap(cls, "__init__", with_legacy)


def full_precision(kwargs: dict[str, Any]) -> None:
    """Load in float32 where a script names no precision, as before 5.0, which takes the checkpoint's (in place).

    LLaVA's train.py passes `torch_dtype=None` without --bf16 and counts on float32: optimizer steps vanish in half
    precision. What is loaded quantised keeps its own default. Up to 4.55, which knows no `dtype`, float32 is the rule.
    """
    from transformers import PretrainedConfig

    if not hasattr(PretrainedConfig(), "dtype"):
        return
    quantised = ("quantization_config", "load_in_8bit", "load_in_4bit")
    if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None and not any(map(kwargs.get, quantised)):
        kwargs.pop("torch_dtype", None)
        kwargs["dtype"] = torch.get_default_dtype()


def fix_quantisation_arguments(kwargs: dict[str, Any]) -> None:
    """Llava's loader and script say both how to quantise and `load_in_4bit`, of which transformers takes one (4.41 on).

    In 5.0 the short form is gone altogether.
    """
    asked = {name: kwargs.pop(name) for name in ("load_in_8bit", "load_in_4bit") if name in kwargs}
    if any(asked.values()) and kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
        kwargs["torch_dtype"] = torch.float16  # the rest's precision up to 4.57, to which llava brings its tower
    if any(asked.values()) and kwargs.get("quantization_config") is None:
        from transformers import BitsAndBytesConfig

        kwargs["quantization_config"] = BitsAndBytesConfig(**asked)


def fix_recorder(undo: UndoStack) -> None:
    """A model that records hidden states hooks the models inside it too (5.1x on), again where they have hooks already.

    llava's tower is inside its decoder: once somebody has asked that for hidden states, the tower would report each of
    its own twice, and llava would take the features of another block.
    """
    try:
        output_capturing = importlib.import_module("transformers.utils.output_capturing")
    except ImportError:
        return

    def once(install: Callable[..., None], model: Any, *args: Any, **kwargs: Any) -> None:
        if not getattr(model, "_output_capturing_hooks_installed", False):
            install(model, *args, **kwargs)

    undo.wrap(output_capturing, "install_all_output_capturing_hooks", once)


def flash_fallback(kwargs: dict[str, Any]) -> None:
    """`train_mem.py` asks for flash_attention_2; without the package, use sdpa and say so (in place)."""
    if kwargs.get("attn_implementation") == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        logger.warning("flash_attention_2 was asked for but flash_attn is not installed: using sdpa")
        print("llava_patch: flash_attn is not installed; attention falls back to sdpa", file=sys.stderr)
        kwargs["attn_implementation"] = "sdpa"
