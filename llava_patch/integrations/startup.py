"""What happens in unmodified scripts: flags, environment, compatibility fixes, and patched checkpoints on load.

Each step leaves a model or script alone unless a patch is configured, a checkpoint carries one, or the stock code would
raise on the installed versions or load random weights (a vision tower that is not CLIP, in a package that brings no
other). On versions that llava_patch does not support hosts stay as they are, and what was asked for is refused.
"""

from __future__ import annotations

import functools
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llava_patch.core.errors import HostError, LlavaPatchError
from llava_patch.settings import active

if TYPE_CHECKING:
    from llava_patch.core.undo import UndoStack
    from llava_patch.settings.gin_config import Configuration

# --- the import hook's dispatch ---------------------------------------------------------------------------------------


def on_import(name: str, module: Any) -> None:
    """Run what a freshly imported host module needs; called by the import hook.

    Raises:
        LlavaPatchError: what is configured cannot be honoured. With nothing configured a handler that fails says so
            and leaves the host as it is.
    """
    from llava_patch.core.undo import UndoStack

    undo = UndoStack()
    try:
        _HANDLERS[name](module, undo)
    except LlavaPatchError:
        undo.unwind()
        raise
    except Exception as error:  # a host that is not as we know it may make anything fail
        undo.unwind()
        found = f"{name} is not as llava_patch knows it ({type(error).__name__}: {error})"
        if active.asked():
            raise HostError(f"{found}, so what is configured cannot be applied: see `llava-patch doctor`") from error
        print(f"llava_patch: {found} and stays as it is; nothing is configured", file=sys.stderr)


def _mends() -> bool:
    """Whether `llava` is loaded, on versions that the mends of `compat` were written for."""
    from llava_patch.hosts import compat

    return "llava" in sys.modules and compat.unsupported() is None


def _on_transformers_trainer(module: ModuleType, undo: "UndoStack") -> None:
    if _mends():
        from llava_patch.hosts import compat

        compat.fix_trainer_exports(module, undo)


def _on_llava(module: ModuleType, undo: "UndoStack") -> None:
    from llava_patch.hosts import compat

    if active.asked():  # before the package's training code may fail on such a version
        compat.check_versions()
    if "transformers.trainer" in sys.modules:
        _on_transformers_trainer(sys.modules["transformers.trainer"], undo)


def _on_llava_model(module: ModuleType, undo: "UndoStack") -> None:
    if not _mends():
        return
    from llava_patch.hosts import compat

    for name in ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM"):
        cls = vars(module).get(name)
        if cls is not None and cls.__module__ == module.__name__:
            compat.fix_forward_arguments(cls, undo)


def _on_llava_trainer(module: ModuleType, undo: "UndoStack") -> None:
    from llava_patch.hosts import compat

    active.take_flags_from_command_line()
    if compat.unsupported() is not None:
        if active.asked():
            compat.check_versions()
        return
    active.begin_training()
    asked = active.configuration()  # raises here, before a model is loaded or a file written
    if _mends():
        compat.fix_argv(sys.argv)
        compat.fix_trainer_methods(module, undo)
        compat.fix_optimizer_groups(module, undo)
    if asked is not None:
        _add_flags(asked)
        _wrap_argument_parser(asked, undo)
    _wrap_trainer_init(module.LLaVATrainer, undo)
    _wrap_create_optimizer(module.LLaVATrainer, undo)


def _add_flags(asked: "Configuration") -> None:
    """Append the flags that gin binds to the script's own: of two, its parser takes the later."""
    from llava_patch.hosts import compat
    from llava_patch.settings import flags

    added = flags.arguments(asked.flags)
    compat.fix_argv(added)
    if added and os.environ.get("RANK", "0") == "0":
        print(flags.describe(sys.argv[1:], added), flush=True)
    sys.argv.extend(added)


def _wrap_argument_parser(asked: "Configuration", undo: "UndoStack") -> None:
    """When the script parses its flags: refuse unknown ones by their gin names, and seed.

    LLaVA makes a new projector and LoRA's matrices before the Trainer seeds anything.
    """
    from transformers import HfArgumentParser, set_seed

    from llava_patch.hosts import compat
    from llava_patch.settings import flags

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

    undo.set_attribute(cls, "parse_args_into_dataclasses", parse_args_into_dataclasses)


def _on_lmms_eval(module: ModuleType, undo: "UndoStack") -> None:
    from llava_patch.integrations.lmms_eval import command

    command.watch()  # with our flags still in its arguments
    active.take_flags_from_command_line()


def _on_lmms_eval_tasks(module: ModuleType, undo: "UndoStack") -> None:
    from llava_patch.integrations.lmms_eval import register

    register.register_tasks()


def _on_lmms_eval_main(module: ModuleType, undo: "UndoStack") -> None:
    from llava_patch.integrations.lmms_eval import loud

    loud.install()


# --- training ---------------------------------------------------------------------------------------------------------


def _on_llava_arch(module: ModuleType, undo: "UndoStack") -> None:
    from llava_patch.hosts import compat

    if compat.unsupported() is not None:
        return
    builder = sys.modules.get(module.build_vision_tower.__module__)
    if builder is not None and not compat.brings_towers(builder):
        _wrap_tower_builder(module, undo)
    cls = module.LlavaMetaModel  # type: ignore[attr-defined]
    original = cls.initialize_vision_modules

    @functools.wraps(original)
    def initialize_vision_modules(self: Any, model_args: Any, fsdp: Any = None) -> None:
        from llava_patch.integrations.training import llava as training_run
        from llava_patch.integrations.training import stage1

        asked = active.configuration()
        path = model_args.pretrain_mm_mlp_adapter
        if not active.training():
            return original(self, model_args, fsdp)
        projector = None
        if path is not None:
            projector = stage1.check_projector(path, stage1.fusion_of_run(asked, self.config))
        if asked is None or not asked.patches:
            return original(self, model_args, fsdp)
        fresh = getattr(self, "mm_projector", None) is None and path is None
        fused = projector is not None and not stage1.is_stock(projector, stage1.tower_width(self, model_args))
        if fused:  # the stock layer cannot hold it: load it once the projector is widened
            model_args.pretrain_mm_mlp_adapter = None
        try:
            original(self, model_args, fsdp)
        finally:
            model_args.pretrain_mm_mlp_adapter = path
        training_run.pending[id(self)] = training_run.Pending(fresh, projector if fused else None)

    undo.set_attribute(cls, "initialize_vision_modules", initialize_vision_modules)


def _wrap_tower_builder(module: Any, undo: "UndoStack") -> None:
    """Build vision towers that are not CLIP, which llava refuses by name or fills with random weights."""
    original = module.build_vision_tower

    @functools.wraps(original)
    def build_vision_tower(vision_tower_cfg: Any, **kwargs: Any) -> Any:
        from llava_patch.hosts.towers import llava as llava_tower

        name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
        tower = llava_tower.build(name, vision_tower_cfg, **kwargs)
        return original(vision_tower_cfg, **kwargs) if tower is None else tower

    undo.set_attribute(module, "build_vision_tower", build_vision_tower)


def _wrap_trainer_init(cls: Any, undo: "UndoStack") -> None:
    from llava_patch.hosts import compat

    original = cls.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        training_args = kwargs.get("args", args[1] if len(args) > 1 else None)
        data = [
            kwargs.get(k, args[i] if len(args) > i else None) for i, k in ((3, "train_dataset"), (2, "data_collator"))
        ]
        asked = active.configuration()
        if model is None or (asked is None and handle_of(model) is None):
            if model is not None and _mends():
                compat.fix_zero3_dtypes(model, training_args)
            return original(self, *args, **kwargs)
        from llava_patch.integrations.training import llava as training_run

        handle = training_run.prepare(model, training_args, *data)
        probed = handle is not None and handle.auxiliary is not None and handle.auxiliary.head is not None
        if probed:
            args, kwargs = _carry_regions(handle, args, kwargs)
        compat.fix_zero3_dtypes(model, training_args)
        gradients = None if asked is None else asked.measurements.get("Gradients")
        if gradients is not None:
            from llava_patch.integrations.training.gradients import follow as follow_gradients
            from llava_patch.integrations.training.gradients_check import check

            check(model, training_args, gradients)
        original(self, *args, **kwargs)
        if probed:
            from llava_patch.integrations.training.auxiliary.trainer import follow

            follow(self, release=True)  # before the callback that saves what was trained
        if gradients is not None:
            follow_gradients(self, gradients)
        if handle is not None or (asked is not None and asked.flags):
            self.add_callback(training_run.make_callback(handle))

    undo.set_attribute(cls, "__init__", __init__)


def _carry_regions(handle: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The Trainer's arguments with data that carry the auxiliary loss's regions."""
    from llava_patch.integrations.training.auxiliary import llava_data

    places, positional, named = {"data_collator": 2, "train_dataset": 3}, list(args), dict(kwargs)
    data = {name: args[i] if len(args) > i else kwargs.get(name) for name, i in places.items()}
    data["train_dataset"], data["data_collator"] = llava_data.wrap(handle.auxiliary, **data)
    for name, i in places.items():
        if len(positional) > i:
            positional[i] = data[name]
        else:
            named[name] = data[name]
    return tuple(positional), named


def _wrap_create_optimizer(cls: Any, undo: "UndoStack") -> None:
    original = cls.create_optimizer

    @functools.wraps(original)
    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = self.optimizer is None
        optimizer = original(self, *args, **kwargs)
        handle = handle_of(self.model)
        if made and handle is not None:
            from llava_patch.integrations.training import fusion as fusion_trainer

            fusion_trainer.arrange(self, handle)
        return optimizer

    undo.set_attribute(cls, "create_optimizer", create_optimizer)


def handle_of(model: Any) -> Any:
    """The handle of a patched model; None without loading anything where nothing can have been patched yet."""
    module = sys.modules.get("llava_patch.patching.handle")
    return None if module is None else module.get_handle(model)


# --- loading ----------------------------------------------------------------------------------------------------------


def _on_modeling_utils(module: ModuleType, undo: "UndoStack") -> None:
    cls = module.PreTrainedModel  # type: ignore[attr-defined]
    original = cls.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(model_class: Any, path: Any = None, *args: Any, **kwargs: Any) -> Any:
        from llava_patch.hosts import compat
        from llava_patch.integrations import loading

        if loading.is_bare(model_class):
            return loading.load_stock(original, model_class, path, args, kwargs, loading.bare_refusal(model_class))
        if not loading.is_host(model_class):
            if active.asked():
                loading.say_unpatched(model_class)
            return original(model_class, path, *args, **kwargs)
        active.take_flags_from_command_line()  # of a script of one's own that leaves unknown ones alone
        if compat.unsupported() is not None:
            if active.asked():
                compat.check_versions()
            why = f"which cannot be applied: {compat.unsupported()}"
            return loading.load_stock(original, model_class, path, args, kwargs, why)
        if _mends():
            compat.flash_fallback(kwargs)
        return loading.load(original, model_class, path, args, kwargs)

    undo.set_attribute(cls, "from_pretrained", classmethod(from_pretrained))


_HANDLERS = {
    "transformers.modeling_utils": _on_modeling_utils,
    "transformers.trainer": _on_transformers_trainer,
    "llava": _on_llava,
    "llava.model.llava_arch": _on_llava_arch,
    "llava.model.language_model.llava_llama": _on_llava_model,
    "llava.model.language_model.llava_mistral": _on_llava_model,
    "llava.train.llava_trainer": _on_llava_trainer,
    "lmms_eval": _on_lmms_eval,
    "lmms_eval.__main__": _on_lmms_eval_main,
    "lmms_eval.tasks": _on_lmms_eval_tasks,
}
