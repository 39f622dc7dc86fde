"""What happens in unmodified scripts: flags, environment, compatibility fixes, and patched checkpoints on load.

Everything class-level that llava_patch does to its hosts is in this file; each step leaves a model or script alone
unless a patch is configured, a checkpoint carries one, or the stock code would raise on the installed versions.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llava_patch.errors import CheckpointError, SettingError

if TYPE_CHECKING:
    from llava_patch.config import Configuration
    from llava_patch.patching import Handle

FILE_FLAG, PARAM_FLAG = "--gin_file", "--gin_param"
FILE_VARIABLE, PARAM_VARIABLE = "LLAVA_PATCH_GIN_FILE", "LLAVA_PATCH_GIN_PARAM"
OPERATIVE_FILE = "llava_patch_operative.gin"
ADAPTER_FOLDER = "llava_patch_adapter"

_flags: tuple[list[str], list[str]] = ([], [])
_configuration: "Configuration | None" = None
_training = False


# --- configuration ----------------------------------------------------------------------------------------------------


def take_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """Remove our flags from a command line, in place.

    Args:
        argv: the arguments; `--flag value` and `--flag=value` both work, and each flag may be repeated.

    Returns:
        (values of --gin_file, values of --gin_param), in order.

    Raises:
        SettingError: a flag without a value.
    """
    files: list[str] = []
    params: list[str] = []
    kept: list[str] = []
    rest = iter(argv)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag not in (FILE_FLAG, PARAM_FLAG):
            kept.append(argument)
            continue
        if not equals:
            value = next(rest, "")
        if not value:
            raise SettingError(f"{flag} needs a value")
        (files if flag == FILE_FLAG else params).append(value)
    argv[:] = kept
    return files, params


def configuration() -> "Configuration | None":
    """What flags and environment ask for, read once; None when nothing is configured.

    Raises:
        SettingError: a configuration that cannot be honoured; nothing was changed then.
    """
    global _configuration
    files = [*_split(os.environ.get(FILE_VARIABLE)), *_flags[0]]
    params = [*_split(os.environ.get(PARAM_VARIABLE)), *_flags[1]]
    if not files and not params:
        return None
    if _configuration is None:
        from llava_patch import config

        read = config.read(files, params)
        if not read:
            raise SettingError(
                f"{', '.join([*files, *params])} configures nothing: bind Patch.fusion or Patch.routing, or a field "
                "of a method or measurement"
            )
        if read.sweep is not None:
            raise SettingError(f"{', '.join([*files, *params])} describes a sweep: run it with `llava-patch sweep`")
        if read.flags and not _training:  # a training recipe reused for evaluation
            names = ", ".join(f"Flags.{name}" for name in read.flags)
            print(f"llava_patch: {names}: flags of LLaVA's training script, without effect here", file=sys.stderr)
        _configuration = read
    return _configuration


def reset() -> None:
    """Forget flags and configuration (for tests and notebooks)."""
    global _configuration, _flags, _training
    _configuration, _flags, _training = None, ([], []), False


def _split(value: str | None) -> list[str]:
    return [part.strip() for part in (value or "").split(";") if part.strip()]


def _take_flags_from_command_line() -> None:
    files, params = take_flags(sys.argv)
    _flags[0].extend(files)
    _flags[1].extend(params)


# --- the import hook's dispatch ---------------------------------------------------------------------------------------


def on_import(name: str, module: Any) -> None:
    """Run what a freshly imported host module needs; called by the import hook."""
    _HANDLERS[name](module)


def _on_transformers_trainer(module: ModuleType) -> None:
    if "llava" in sys.modules:
        from llava_patch.hosts import compat

        compat.fix_trainer_exports(module)


def _on_llava(module: ModuleType) -> None:
    if "transformers.trainer" in sys.modules:
        _on_transformers_trainer(sys.modules["transformers.trainer"])


def _on_llava_model(module: ModuleType) -> None:
    from llava_patch.hosts import compat

    for name in ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM"):
        cls = vars(module).get(name)
        if cls is not None and cls.__module__ == module.__name__:
            compat.fix_forward_arguments(cls)


def _on_llava_trainer(module: ModuleType) -> None:
    global _training
    from llava_patch.hosts import compat

    _training = True
    _take_flags_from_command_line()
    compat.fix_argv(sys.argv)
    compat.fix_trainer_methods(module)
    compat.fix_optimizer_groups(module)
    asked = configuration()  # raises here, before a model is loaded or a file written
    if asked is not None:
        compat.check_versions()
        _add_flags(asked)
        _wrap_argument_parser(asked)
    _wrap_trainer_init(module.LLaVATrainer)


def _add_flags(asked: "Configuration") -> None:
    """Append the flags that gin binds to the script's own: of two, its parser takes the later."""
    from llava_patch import flags
    from llava_patch.hosts import compat

    added = flags.arguments(asked.flags)
    compat.fix_argv(added)
    if added and os.environ.get("RANK", "0") == "0":
        print(flags.describe(sys.argv[1:], added), flush=True)
    sys.argv.extend(added)


def _wrap_argument_parser(asked: "Configuration") -> None:
    """When the script parses its flags: refuse unknown ones by their gin names, and seed.

    LLaVA makes a new projector and LoRA's matrices before the Trainer seeds anything.
    """
    from transformers import HfArgumentParser, set_seed

    from llava_patch import flags
    from llava_patch.hosts import compat

    cls: Any = HfArgumentParser
    original = cls.parse_args_into_dataclasses

    @functools.wraps(original)
    def parse_args_into_dataclasses(self: Any, *args: Any, **kwargs: Any) -> Any:
        cls.parse_args_into_dataclasses = original  # for the script's own call only
        renamed = dict(asked.flags)
        for name in asked.flags:
            option = [f"--{name}"]
            compat.fix_argv(option)
            renamed[option[0][2:]] = renamed.pop(name)
        flags.refuse_unknown(renamed, self._option_string_actions)
        parsed = original(self, *args, **kwargs)
        for part in parsed:
            if hasattr(part, "seed"):
                set_seed(part.seed)
        return parsed

    cls.parse_args_into_dataclasses = parse_args_into_dataclasses


def _on_lmms_eval(module: ModuleType) -> None:
    _take_flags_from_command_line()


def _on_lmms_eval_tasks(module: ModuleType) -> None:
    from llava_patch.evaluation import register

    register.register_tasks()


# --- training ---------------------------------------------------------------------------------------------------------


class _Pending:
    """What `initialize_vision_modules` learned and the patch, applied when the Trainer is made, needs."""

    def __init__(self, fresh: bool, projector: dict[str, Any] | None) -> None:
        self.fresh = fresh
        self.projector = projector


_pending: dict[int, _Pending] = {}


def _on_llava_arch(module: ModuleType) -> None:
    cls = module.LlavaMetaModel  # type: ignore[attr-defined]
    original = cls.initialize_vision_modules

    @functools.wraps(original)
    def initialize_vision_modules(self: Any, model_args: Any, fsdp: Any = None) -> None:
        asked = configuration()
        if not _training or asked is None or not asked.patches:
            return original(self, model_args, fsdp)
        fresh = getattr(self, "mm_projector", None) is None and model_args.pretrain_mm_mlp_adapter is None
        path = model_args.pretrain_mm_mlp_adapter
        projector = _read_projector(path) if path is not None else None
        fused = projector is not None and _first_width(projector) != _tower_width(self, model_args)
        if fused:  # the stock layer cannot hold it: load it once the projector is widened
            model_args.pretrain_mm_mlp_adapter = None
        try:
            original(self, model_args, fsdp)
        finally:
            model_args.pretrain_mm_mlp_adapter = path
        _pending[id(self)] = _Pending(fresh, projector if fused else None)

    cls.initialize_vision_modules = initialize_vision_modules


def _read_projector(path: str) -> dict[str, Any]:
    import torch

    if not os.path.isfile(path):
        raise CheckpointError(f"--pretrain_mm_mlp_adapter {path}: no such file")
    # LLaVA's own file format; weights_only keeps a foreign pickle from running code.
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    found = {k.split("mm_projector.")[1]: v for k, v in tensors.items() if "mm_projector." in k}
    if not found:
        raise CheckpointError(f"--pretrain_mm_mlp_adapter {path}: holds no mm_projector tensors")
    return found


def _first_width(projector: dict[str, Any]) -> int:
    for name in ("0.weight", "weight"):
        if name in projector:
            return int(projector[name].shape[1])
    raise CheckpointError(f"projector file without a first Linear; it holds {sorted(projector)}")


def _tower_width(decoder: Any, model_args: Any) -> int:
    tower = decoder.get_vision_tower()
    if tower is not None:
        return int(tower.hidden_size)
    from transformers import CLIPVisionConfig

    return int(CLIPVisionConfig.from_pretrained(model_args.vision_tower).hidden_size)


def _wrap_trainer_init(cls: Any) -> None:
    from llava_patch.hosts import compat

    original = cls.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        training_args = kwargs.get("args", args[1] if len(args) > 1 else None)
        data = [
            kwargs.get(k, args[i] if len(args) > i else None) for i, k in ((3, "train_dataset"), (2, "data_collator"))
        ]
        handle = None if model is None else _prepare_training(model, training_args, *data)
        if model is not None:
            compat.fix_zero3_dtypes(model, training_args)
        original(self, *args, **kwargs)
        asked = configuration()
        if handle is not None or (asked is not None and asked.flags):
            self.add_callback(_make_callback(handle))

    cls.__init__ = __init__


def _prepare_training(model: Any, training_args: Any, dataset: Any, collator: Any) -> "Handle | None":
    from llava_patch.patching import get_handle

    asked = configuration()
    handle = get_handle(model)
    if asked is not None and asked.patches:
        handle = _patch_for_training(model, training_args, asked, dataset, collator)
    if handle is None:
        return None
    routing = handle.routing
    if routing is not None and routing.split == len(handle.anatomy.layers) and routing.freeze != "none":
        raise SettingError(
            f"Routing.split = {routing.split} is this model's depth: nothing is routed and there is no side branch for "
            f'Routing.freeze = "{routing.freeze}" to train'
        )
    if getattr(training_args, "tune_mm_mlp_adapter", False) and routing is not None and routing.freeze != "none":
        raise SettingError(
            f'--tune_mm_mlp_adapter True trains the projector, but Routing.freeze = "{routing.freeze}" freezes it: '
            "leave Routing out of stage 1"
        )
    if getattr(training_args, "n_gpu", 0) > 1:
        raise SettingError(
            f"one process on {training_args.n_gpu} GPUs (nn.DataParallel) would run the first GPU's weights on all of "
            "them under a patch: launch with torchrun or deepspeed, or set CUDA_VISIBLE_DEVICES to one"
        )
    _train_side_branch_in_full(model, handle)
    handle.apply_freeze()
    if getattr(training_args, "process_index", 0) == 0:
        print(f"llava_patch: {handle!r}\nllava_patch: {handle.report()}", flush=True)
    return handle


def _train_side_branch_in_full(model: Any, handle: "Handle") -> None:
    """Keep peft's LoRA and the side branch apart.

    LLaVA's script puts LoRA on every Linear, of a model that was loaded patched on the side branch's too: it is taken
    off again. The branch is then saved with LLaVA's other non-LoRA weights, and the adapter's config says that LoRA
    leaves it out, or peft would look for its matrices when LLaVA's loader applies the adapter.
    """
    from llava_patch.hosts import lora
    from llava_patch.routing.side_branch import SIDE_BRANCH, copy_layers

    branch = getattr(handle.anatomy.decoder, SIDE_BRANCH, None)
    if branch is None:
        return
    if lora.has_lora(branch):
        setattr(handle.anatomy.decoder, SIDE_BRANCH, copy_layers(branch))
    for config in getattr(model, "peft_config", {}).values():
        if getattr(config, "exclude_modules", "") is None:  # peft 0.14 and newer
            config.exclude_modules = rf".*\.{SIDE_BRANCH}\..*"


def _patch_for_training(
    model: Any, training_args: Any, asked: "Configuration", dataset: Any, collator: Any
) -> "Handle":
    from transformers import set_seed

    from llava_patch.hosts import anatomy
    from llava_patch.patching import patch

    found = anatomy.find(model)
    pending = _pending.pop(id(found.decoder), None)
    fresh = pending is not None and pending.fresh
    methods = asked.methods()
    set_seed(getattr(training_args, "seed", 42))
    if pending is not None and pending.projector is not None:  # before anything is measured through it
        patch(model, fusion=asked.fusion)
        _load_fused_projector(found, pending.projector, asked.fusion)
    if _auto_split(asked):
        methods["routing"] = _resolve_auto(model, training_args, asked, dataset, collator, fresh)
        set_seed(getattr(training_args, "seed", 42))  # the data set may have drawn random numbers
    return patch(model, **methods, zero_start=not fresh)


def _load_fused_projector(anatomy: Any, projector: dict[str, Any], fusion: Any) -> None:
    expected = {k: tuple(v.shape) for k, v in anatomy.projector.state_dict().items()}
    given = {k: tuple(v.shape) for k, v in projector.items()}
    if expected != given:
        raise CheckpointError(
            f"--pretrain_mm_mlp_adapter holds a projector of shapes {given}, but {fusion or 'no fusion'} "
            f"makes {expected}: use the fusion settings that it was trained with"
        )
    anatomy.projector.load_state_dict(projector)


def _auto_split(asked: "Configuration") -> bool:
    return asked.routing is not None and asked.routing.split == "auto"


def _resolve_auto(
    model: Any, training_args: Any, asked: "Configuration", dataset: Any, collator: Any, fresh: bool
) -> Any:
    from llava_patch.diagnostics.saturation import Saturation
    from llava_patch.diagnostics.trainer_split import resolve_for_training

    if fresh:
        raise SettingError(
            'Routing.split = "auto" measures how the model reads images, but its projector is new: leave Routing out '
            "of stage 1, or give --pretrain_mm_mlp_adapter"
        )
    assert asked.routing is not None
    settings = asked.measurements.get("Saturation", Saturation())
    return resolve_for_training(model, asked.routing, training_args, dataset, collator, settings)


def _make_callback(handle: "Handle | None") -> Any:
    from transformers import TrainerCallback

    class PatchCallback(TrainerCallback):
        """Writes settings, operative config and (at the end) the adapter into the run's folder."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                write_records(handle, Path(args.output_dir))

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                write_records(handle, Path(args.output_dir) / f"checkpoint-{state.global_step}")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if handle is None:
                return
            from llava_patch import checkpoint
            from llava_patch.hosts import lora, zero

            if lora.has_lora(handle.model):
                if state.is_world_process_zero:
                    print("llava_patch: no separate adapter beside LoRA: LLaVA's LoRA files hold our weights")
            # Partitioned weights are put together by all ranks, of which the first one writes.
            elif state.is_world_process_zero or zero.is_partitioned(handle.model.parameters()):
                checkpoint.save(handle, Path(args.output_dir) / ADAPTER_FOLDER)

    return PatchCallback()


def write_records(handle: "Handle | None", folder: Path) -> None:
    """Write a patch's settings, if there is one, and gin's operative config into a run's or checkpoint's folder."""
    from llava_patch import checkpoint

    if handle is not None:
        record = {**handle.settings(), "form": "full"}
        checkpoint.write_text(folder / checkpoint.SETTINGS_FILE, json.dumps(record, indent=2) + "\n")
    asked = configuration()
    if asked is not None:
        header = "".join(f"# {line}\n" for line in ("operative config of llava_patch, from:", *asked.sources))
        operative = asked.operative
        if (
            handle is not None and handle.routing is not None and _auto_split(asked)
        ):  # the file reproduces the run: it holds what was chosen
            operative = re.sub(r"(?m)^(\S*Routing\.split) = .*$", rf"\1 = {handle.routing.split}", operative)
        checkpoint.write_text(folder / OPERATIVE_FILE, f"{header}\n{operative}")


# --- loading ----------------------------------------------------------------------------------------------------------


def _on_modeling_utils(module: ModuleType) -> None:
    cls = module.PreTrainedModel  # type: ignore[attr-defined]
    original = cls.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(model_class: Any, path: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not _is_host(model_class):
            return original(model_class, path, *args, **kwargs)
        if "llava" in sys.modules:
            from llava_patch.hosts import compat

            compat.flash_fallback(kwargs)
        return _load_host(original, model_class, path, args, kwargs)

    cls.from_pretrained = classmethod(from_pretrained)


def _is_host(cls: Any) -> bool:
    return hasattr(cls, "prepare_inputs_labels_for_multimodal") or any(
        c.__name__ in ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration") for c in cls.__mro__
    )


def _load_host(original: Any, cls: Any, path: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    from llava_patch import checkpoint
    from llava_patch.patching import get_handle

    record = checkpoint.read_settings(path) if isinstance(path, (str, os.PathLike)) else None
    if record is not None and record.get("form") == "adapter":
        return _finish(_load_adapter(original, cls, path, record, args, kwargs))
    config = kwargs.get("config")
    carried = checkpoint.config_record(config) if config is not None else None
    if carried and str(getattr(config, "_name_or_path", path)) != str(path):
        return _load_base_for(original, cls, path, config, carried, args, kwargs)
    wants_info = kwargs.pop("output_loading_info", False)
    with _patched_construction(cls):
        model, info = original(cls, path, *args, output_loading_info=True, **kwargs)
    handle = get_handle(model)
    if handle is not None:
        missing = sorted(set(checkpoint.adapter_names(handle)) & set(info["missing_keys"]))
        if missing:
            raise CheckpointError(
                f"{path}: the checkpoint says it carries {handle!r} but lacks {missing[0]} ({len(missing)} tensors)"
            )
        if handle.fusion is not None and handle.fusion.train_tower != "frozen":
            checkpoint.restore_tower(handle, Path(path))
        handle.apply_freeze()
    _finish(model)
    return (model, info) if wants_info else model


def _load_base_for(
    original: Any, cls: Any, path: Any, config: Any, carried: dict, args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Load a base under a patched checkpoint's config, as llava's builder does when it is given a model_base.

    The base has stock shapes, so it is loaded as it is and patched afterwards; the builder then fills in the
    checkpoint's own files (mm_projector.bin, non_lora_trainables.bin).
    """
    from llava_patch import checkpoint
    from llava_patch.patching import patch

    source = getattr(config, "_name_or_path", "config.json")
    loaded = original(cls, path, *args, **{**kwargs, "config": _stock_config(config)})
    patch(_model_of(loaded), **checkpoint.methods(carried, f"{source}/config.json"))
    return _finish(loaded)


def _finish(model: Any) -> Any:
    """Apply what flags or environment ask for to a model that is loaded for use; training waits for the Trainer."""
    asked = None if _training else configuration()
    if asked is not None and asked.patches:
        from llava_patch.patching import patch

        patch(_model_of(model), **asked.methods())
    return model


def _model_of(loaded: Any) -> Any:
    """The model in what from_pretrained returned, with or without loading info."""
    return loaded[0] if isinstance(loaded, tuple) else loaded


def _stock_config(config: Any) -> Any:
    """A copy of a configuration without the patch it carries: the base is loaded as it is and patched afterwards."""
    from llava_patch.patching import CONFIG_KEY

    config = copy.deepcopy(config)
    vars(config).pop(CONFIG_KEY, None)
    return config


def _load_adapter(original: Any, cls: Any, path: Any, record: dict, args: tuple, kwargs: dict[str, Any]) -> Any:
    from llava_patch import checkpoint

    config = kwargs.pop("config", None)
    if config is None:
        config = cls.config_class.from_pretrained(path)
    base = record["base"]
    if os.path.isabs(base) and not os.path.isdir(base):
        raise CheckpointError(
            f'{path}: its base model {base} is not there any more; change "base" in '
            f"{os.path.join(path, checkpoint.SETTINGS_FILE)} to where it is now"
        )
    loaded = original(cls, base, *args, config=_stock_config(config), **kwargs)
    checkpoint.load(_model_of(loaded), path)
    return loaded


@contextlib.contextmanager
def _patched_construction(cls: Any) -> Iterator[None]:
    """While a checkpoint whose config carries a patch is loaded, build the model with its added modules in place.

    The host's loader then fills them like any others: sharded files, device maps and precisions need no code of ours.
    """
    own = "__init__" in vars(cls)
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, config, *args, **kwargs)
        from llava_patch import checkpoint
        from llava_patch.patching import patch

        record = checkpoint.config_record(config)
        if type(self) is cls and record:
            patch(self, **checkpoint.methods(record, "config.json"), loading=True)

    cls.__init__ = __init__
    try:
        yield
    finally:
        if own:
            cls.__init__ = original
        else:
            del cls.__init__


_HANDLERS = {
    "transformers.modeling_utils": _on_modeling_utils,
    "transformers.trainer": _on_transformers_trainer,
    "llava": _on_llava,
    "llava.model.llava_arch": _on_llava_arch,
    "llava.model.language_model.llava_llama": _on_llava_model,
    "llava.model.language_model.llava_mistral": _on_llava_model,
    "llava.train.llava_trainer": _on_llava_trainer,
    "lmms_eval": _on_lmms_eval,
    "lmms_eval.tasks": _on_lmms_eval_tasks,
}
