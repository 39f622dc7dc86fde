"""What happens in unmodified scripts: flags, environment, compatibility fixes, and patched checkpoints on load.

Each step leaves a model or script alone unless a patch is configured, a checkpoint carries one, or the stock code would
raise on the installed versions, train something else there than on those that it was written for, or load random
weights (a vision tower that is not CLIP, in a package that brings no other). On versions that llava_patch does not
support hosts stay as they are, and what was asked for is refused.
"""

import functools
import pkgutil
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from llava_patch.core import records
from llava_patch.core.errors import HostError, LlavaPatchError
from llava_patch.core.undo import UndoStack
from llava_patch.integrations import loading
from llava_patch.settings import active


def on_import(name: str, module: Any) -> None:
    """Run what a freshly imported host module needs; called by the import hook.

    A handler that fails says so and leaves the host as it is; LlavaPatchError: what is configured cannot be honoured.
    """
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


def _compat() -> Any:
    """The module of that name, which imports torch: a command of lmms-eval may not need it."""
    from llava_patch.hosts import compat

    return compat


def _llava_code() -> Any:
    from llava_patch.hosts import llava_code

    return llava_code


def _mends() -> bool:
    """Whether `llava` is loaded, on versions that the mends of `llava_code` were written for."""
    return "llava" in sys.modules and _compat().unsupported() is None


def _on_transformers_trainer(module: Any, undo: UndoStack) -> None:
    _mend_trainer_exports(module, undo)

    def train(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        llava_trainer = getattr(sys.modules.get("llava.train.llava_trainer"), "LLaVATrainer", ())
        if not isinstance(self, llava_trainer):  # which gets its patch when it is made
            _prepare_run(self)
        if loading.handle_of(self.model) is None:
            loading.check_resumed(self, args[0] if args else kwargs.get("resume_from_checkpoint"))
            return original(self, *args, **kwargs)
        from llava_patch.integrations.training import resume

        return resume.train(self, functools.partial(original, self), *args, **kwargs)

    undo.wrap(module.Trainer, "train", train)


def _mend_trainer_exports(module: ModuleType, undo: UndoStack) -> None:
    if _mends():
        _llava_code().fix_trainer_exports(module, undo)


def _on_llama_tokenizer(module: Any, undo: UndoStack) -> None:
    if _mends():
        _llava_code().fix_llama_tokenizer(module.LlamaTokenizer, undo)


def _prepare_run(trainer: Any) -> None:
    """What a Trainer that is not LLaVA's, as TRL's, gets where its model is patched."""
    handle = loading.handle_of(trainer.model)
    if handle is not None:
        from llava_patch.integrations.training import plain

        plain.prepare(trainer, handle)
    elif active.asked():
        loading.check_patched(trainer.model)


def _on_llava(module: ModuleType, undo: UndoStack) -> None:
    if active.asked():  # before the package's training code may fail on such a version
        _compat().check_versions()
    for name, mend in (
        ("transformers.trainer", _mend_trainer_exports),
        ("transformers.models.llama.tokenization_llama", _on_llama_tokenizer),
    ):
        if name in sys.modules:
            mend(sys.modules[name], undo)


def _on_llava_encoder(module: ModuleType, undo: UndoStack) -> None:
    """It comes before LLaVA-NeXT's resamplers."""
    if _mends():
        _llava_code().fix_model_exports(sys.modules["transformers.modeling_utils"], undo)


def _on_llava_siglip(module: Any, undo: UndoStack) -> None:
    if _mends():
        _llava_code().fix_siglip(module, undo)


def _on_llava_model(module: ModuleType, undo: UndoStack) -> None:
    for name in ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM", "LlavaQwenForCausalLM") if _mends() else ():
        cls = vars(module).get(name)
        if cls is not None and cls.__module__ == module.__name__:
            _llava_code().fix_forward_arguments(cls, undo)
            _llava_code().fix_rope_scaling(cls.config_class, undo)


def _on_llava_trainer(module: Any, undo: UndoStack) -> None:
    compat = _compat()
    active.take_flags_from_command_line()
    if compat.unsupported() is not None:
        if active.asked():
            compat.check_versions()
        return
    active.begin_training()
    asked = active.configuration()  # raises here, before a model is loaded or a file written
    if _mends():
        _llava_code().fix_trainer_methods(module, undo)
        _llava_code().fix_training_loop(module, undo)
        _llava_code().fix_optimizer_groups(module, undo)
    if asked is not None:
        from llava_patch.integrations.training import script_flags

        script_flags.add(asked, undo)
    if _mends():
        _llava_code().fix_argv(sys.argv)  # with those that gin brings

    def create_optimizer(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        made = self.optimizer is None
        optimizer = original(self, *args, **kwargs)
        handle = loading.handle_of(self.model)  # a model may be patched once its Trainer is there
        if made and handle is not None:
            from llava_patch.integrations.training.llava import arrange_groups

            arrange_groups(self, handle)
        return optimizer

    undo.wrap(module.LLaVATrainer, "__init__", _init_trainer)
    undo.wrap(module.LLaVATrainer, "create_optimizer", create_optimizer)


def _init_trainer(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    names = ("model", "args", "data_collator", "train_dataset")[: len(args)]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    model = given.get("model")
    if model is None or (active.configuration() is None and loading.handle_of(model) is None):
        if model is not None and _mends():
            _llava_code().fix_zero3_dtypes(model, given.get("args"))
        return original(self, *args, **kwargs)
    from llava_patch.integrations.training.llava import prepare_run

    attach = prepare_run(given)
    first = [given.pop(name) for name in names]
    original(self, *first, *args[len(names) :], **given)
    attach(self)


def _on_llava_arch(module: Any, undo: UndoStack) -> None:
    compat = _compat()
    if compat.unsupported() is not None:
        return
    if _mends():
        _llava_code().fix_recorder(undo)

    def initialize_vision_modules(original: Any, self: Any, model_args: Any, fsdp: Any = None) -> Any:
        fsdp = _llava_code().fsdp_options(fsdp)
        if not active.training():
            return original(self, model_args, fsdp)
        from llava_patch.integrations.training import stage1

        return stage1.initialize_vision_modules(original, self, model_args, fsdp)

    undo.wrap(module.LlavaMetaModel, "initialize_vision_modules", initialize_vision_modules)
    builder = sys.modules.get(module.build_vision_tower.__module__)
    if builder is not None and compat.brings_towers(builder) and _mends():
        _llava_code().fix_tower_loading(module, undo)
    if builder is None or compat.brings_towers(builder):
        return

    def build_vision_tower(original: Any, vision_tower_cfg: Any, **kwargs: Any) -> Any:
        # Towers that are not CLIP, which llava refuses by name or fills with random weights.
        from llava_patch.hosts.towers import llava as llava_tower

        name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
        tower = llava_tower.build(name, vision_tower_cfg, **kwargs)
        return original(vision_tower_cfg, **kwargs) if tower is None else tower

    undo.wrap(module, "build_vision_tower", build_vision_tower)


def _on_modeling_utils(module: Any, undo: UndoStack) -> None:
    cls = module.PreTrainedModel
    original = cls.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(
        model_class: Any, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any
    ) -> Any:  # with the stock names, by which scripts may call
        call = loading.Loading(original, model_class, pretrained_model_name_or_path, args, kwargs)
        bare = model_class.__name__
        if bare in (
            "LlavaModel",
            "LlavaNextModel",
            "LlavaOnevisionModel",
        ):  # what a host wraps, which cannot be patched by itself
            whole = bare.replace("Model", "ForConditionalGeneration")
            why = f"which {bare} would be loaded without: load it with {whole}, and take its .model"
            return loading.load_stock(call, why)
        if not loading.is_host(model_class):
            if active.asked():
                loading.say_unpatched(model_class)
            return call.stock()
        active.take_flags_from_command_line()  # of a script of one's own that leaves unknown ones alone
        unsupported = _compat().unsupported()
        if unsupported is not None:
            if active.asked():
                _compat().check_versions()
            return loading.load_stock(call, f"which cannot be applied: {unsupported}")
        if _mends():
            _llava_code().flash_fallback(kwargs)
            _llava_code().fix_quantisation_arguments(kwargs)
            if hasattr(model_class, "prepare_inputs_labels_for_multimodal"):
                _llava_code().full_precision(kwargs)
        return loading.load(call)

    undo.set_attribute(cls, "from_pretrained", classmethod(from_pretrained))
    if hasattr(cls, "load_adapter"):
        undo.wrap(cls, "load_adapter", loading.load_adapter)
        undo.wrap(cls, "save_pretrained", loading.save_adapter)
    _note_sources(sys.modules["transformers.configuration_utils"], undo)


def _note_sources(module: Any, undo: UndoStack) -> None:
    """Have a configuration that carries a patch say which checkpoint it is of, as AutoConfig has it.

    That of a class (LLaVA's builder loads a LoRA run's so) is silent or repeats what its file says of another one.
    """
    cls = module.PretrainedConfig
    original = cls.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(config_class: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(config_class, pretrained_model_name_or_path, *args, **kwargs)
        config = found[0] if isinstance(found, tuple) else found  # with unused arguments, or without
        if records.config_record(config):
            config._name_or_path = str(pretrained_model_name_or_path)
        return found

    undo.set_attribute(cls, "from_pretrained", classmethod(from_pretrained))


def _on_peft(module: Any, undo: UndoStack) -> None:
    cls = module.PeftModel
    original = cls.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(model_class: Any, model: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        model_id, kwargs = loading.at_hand(model_id, kwargs)
        loading.patch_base(model, model_id)
        return original(model_class, model, model_id, *args, **kwargs)

    undo.set_attribute(cls, "from_pretrained", classmethod(from_pretrained))
    undo.wrap(cls, "load_adapter", loading.load_adapter)
    undo.wrap(cls, "save_pretrained", loading.save_adapter)


def _on_peft_bnb(module: Any, undo: UndoStack) -> None:
    from llava_patch.hosts import lora

    for name in ("Linear8bitLt", "Linear4bit"):
        for method in ("merge", "unmerge") if hasattr(module, name) else ():
            undo.wrap(getattr(module, name), method, lora.note_change)


def _on_lmms_eval(module: ModuleType, undo: UndoStack) -> None:
    from llava_patch.integrations.lmms_eval import command

    command.watch()  # with our flags still in its arguments
    active.take_flags_from_command_line()


_HANDLERS: dict[str, Callable[[Any, UndoStack], None]] = {
    "transformers.modeling_utils": _on_modeling_utils,
    "transformers.trainer": _on_transformers_trainer,
    "transformers.models.llama.tokenization_llama": _on_llama_tokenizer,
    "llava": _on_llava,
    "llava.model.multimodal_encoder.clip_encoder": _on_llava_encoder,
    "llava.model.multimodal_encoder.siglip_encoder": _on_llava_siglip,
    "llava.model.llava_arch": _on_llava_arch,
    "llava.model.language_model.llava_llama": _on_llava_model,
    "llava.model.language_model.llava_mistral": _on_llava_model,
    "llava.model.language_model.llava_qwen": _on_llava_model,
    "llava.train.llava_trainer": _on_llava_trainer,
    "peft.peft_model": _on_peft,
    "peft.tuners.lora.bnb": _on_peft_bnb,
    "lmms_eval": _on_lmms_eval,
    "lmms_eval.__main__": lambda *_: pkgutil.resolve_name("llava_patch.integrations.lmms_eval.fail_fast:install")(),
    "lmms_eval.tasks": lambda *_: pkgutil.resolve_name("llava_patch.integrations.lmms_eval.register:register_tasks")(),
}
