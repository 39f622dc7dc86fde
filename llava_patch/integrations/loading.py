"""Loading patched checkpoints through the hosts' own from_pretrained: full ones, adapters, and bases of LoRA runs."""

import contextlib
import copy
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llava_patch.core import hub, records
from llava_patch.core.errors import CheckpointError, HostError, LlavaPatchError, brief
from llava_patch.core.undo import UndoStack, meanwhile
from llava_patch.settings import active

_IGNORED = "_keys_to_ignore_on_load_unexpected"  # transformers' own list


def handle_of(model: Any) -> Any:
    """The handle of a patched model; None without loading anything where nothing can have been patched yet."""
    module = sys.modules.get("llava_patch.hosts.anatomy")
    return None if module is None else module.get_handle(model)


def is_host(cls: Any) -> bool:
    """Whether a model class is one of the hosts', or a kin of theirs on which `patch` refuses what is configured."""
    return hasattr(cls, "prepare_inputs_labels_for_multimodal") or any(
        "Llava" in c.__name__ and c.__name__.endswith("ForConditionalGeneration") for c in cls.__mro__
    )


def at_hand(path: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What a loader got as path and as named arguments, an adapter on the hub replaced by its folder here."""
    asked = {name: kwargs[name] for name in hub.OPTIONS if kwargs.get(name)}
    folder = hub.adapter_folder(path, **asked) if isinstance(path, str) else path
    if folder == path:
        return path, kwargs
    return folder, {name: value for name, value in kwargs.items() if name not in hub.OF_THE_NAME}


class Loading(NamedTuple):
    """One call of a host's from_pretrained: the stock function, the model class, and the arguments."""

    original: Callable[..., Any]
    cls: Any
    path: Any
    args: tuple
    kwargs: dict[str, Any]

    def stock(self, path: Any = None, **changed: Any) -> Any:
        """What the stock from_pretrained returns, for another checkpoint or with other named arguments."""
        return self.original(self.cls, self.path if path is None else path, *self.args, **{**self.kwargs, **changed})

    def at_hand(self) -> "Loading":
        """The same call with an adapter on the hub replaced by its folder on this machine."""
        path, kwargs = at_hand(self.path, self.kwargs)
        return self._replace(path=path, kwargs=kwargs)

    def record(self) -> dict[str, Any] | None:
        """The settings file of a patched checkpoint's folder; what its config.json says is checked as well."""
        if not isinstance(self.path, (str, os.PathLike)):
            return None
        record = records.read_settings(self.path)
        if record is None:
            records.checkpoint_record(self.path)
        return record


def load(call: Loading) -> Any:
    """Load a host model, with the patch that its checkpoint carries or that flags and environment ask for.

    CheckpointError: a patched checkpoint lacks tensors, or its base is gone.
    """
    asked, call = call.path, call.at_hand()
    record, config = call.record(), call.kwargs.get("config")
    if record is not None and record.get("form") == records.LORA:
        # Patched, then given peft's layers: the order of the run, and so its bits.
        loaded = load(call._replace(path=records.base_of(call.path, record)))
        _model_of(loaded).load_adapter(str(call.path))  # ours, below
        return loaded
    carried = records.config_record(config) if config is not None else None
    if carried and str(getattr(config, "_name_or_path", call.path)) not in (str(call.path), str(asked)):
        return _load_base_for(call, config, carried)
    if record is not None and record.get("form") == "adapter":
        from llava_patch.hosts import compat
        from llava_patch.patching import checkpoint, floating, vocabulary

        base = records.base_of(call.path, record)
        _check_config(call.path)
        if config is None or isinstance(config, (str, os.PathLike)):
            config = call.cls.config_class.from_pretrained(config or call.path)
        config = _stock_config(config, base)
        size = vocabulary.base_size(base)
        if size is not None:  # it is resized for the adapter's tensors
            compat.text_config(config).vocab_size = size
        with _unquantised(record, floating.tensors_in(call.path)), _base_errors(call.path, base):
            loaded = call.stock(base, config=config)
        checkpoint.load(_model_of(loaded), call.path)
        return _finish(loaded)
    if record is not None:
        _check_config(call.path)
    given = call.kwargs.get("device_map")
    places = {"device_map": dict(given)} if isinstance(given, dict) else {}
    with _construction(call.cls, functools.partial(_patch_new, **places)), _unquantised():
        model, info = call.stock(output_loading_info=True, **places)
    vars(model).pop(_IGNORED, None)
    handle = handle_of(model)
    if handle is not None:
        from llava_patch.patching import checkpoint

        missing = sorted(set(checkpoint.adapter_names(handle)) & set(info["missing_keys"]))
        if missing:
            raise CheckpointError(
                f"{call.path}: the checkpoint says it carries {handle!r} but lacks {missing[0]} ({len(missing)} "
                "tensors)"
            )
        lost = sorted(info["missing_keys"])
        if lost and record is not None and not handle.anatomy.tower_apart:  # transformers fills them at random
            raise CheckpointError(
                f"{call.path}: the checkpoint lacks {lost[0]} ({len(lost)} tensors), or has them under names that this "
                "transformers does not know: open it with the version that wrote it (`transformers_version` in its "
                "config.json)"
            )
        if record is not None:
            records.check_weights(record, Path(call.path))
        if handle.trained_tower:
            checkpoint.restore_tower(handle, call.path)
        handle.apply_freeze()
    _finish(model)
    return (model, info) if call.kwargs.get("output_loading_info") else model


def _check_config(folder: Any) -> None:
    """Refuse a folder of ours without config.json, for which transformers would make a model of its default size."""
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise CheckpointError(f"{folder}: config.json is missing: copy the folder again, or save again")


@contextlib.contextmanager
def _base_errors(folder: Any, base: str) -> Iterator[None]:
    """What a host raises where a base is not the model that an adapter was made on, or is damaged, is one error."""
    try:
        yield
    except (LlavaPatchError, MemoryError):
        raise
    except Exception as error:
        if "out of memory" in str(error).lower():
            raise
        raise CheckpointError(
            f"{folder}: its base {base} cannot be loaded ({type(error).__name__}: {brief(error)}): it is damaged, or "
            f'the adapter was made on another one: name that with --base, or as "base" in {records.SETTINGS_FILE}'
        ) from error


def load_adapter(original: Callable[..., Any], model: Any, folder: Any = None, *args: Any, **kwargs: Any) -> Any:
    """The method of this name, peft's and transformers' own; what else was trained beside the adapter comes too."""
    folder, kwargs = at_hand(folder, kwargs)
    record = _beside_peft(folder, model)
    if record is None:
        return original(model, folder, *args, **kwargs)
    from llava_patch.patching import beside_peft

    load = functools.partial(original, model, folder, *args, **kwargs)
    return beside_peft.load_adapter(model, str(folder), record, load)


def save_adapter(original: Callable[..., Any], model: Any, folder: Any, *args: Any, **kwargs: Any) -> Any:
    """The method `save_pretrained`, peft's and transformers' own; beside an adapter comes what the patch added."""
    handle, adapters = handle_of(model), getattr(model, "peft_config", None)
    save = functools.partial(original, model, folder, *args, **kwargs)
    if not adapters and os.path.isfile(os.path.join(folder, records.SETTINGS_FILE)):
        return _save_whole(handle, Path(folder), save, kwargs.get("is_main_process", True))
    if handle is None or not adapters or os.path.isfile(folder):
        return save()
    from llava_patch.patching import beside_peft

    if not hasattr(model, "get_base_model"):  # transformers' own writes the active one into the folder
        adapters = ("default",)
    adapters = kwargs.get("selected_adapters") or adapters
    return beside_peft.save_adapter(handle, model, str(folder), adapters, kwargs.get("is_main_process", True), save)


def _save_whole(handle: Any, folder: Path, save: Callable[[], Any], writes: bool) -> Any:
    """Save a whole model by the host's own `save_pretrained` where a save of ours lies, whose record it ends."""
    result = save()
    if writes:
        (folder / records.WEIGHTS_FILE).unlink(missing_ok=True)
        if handle is None:
            (folder / records.SETTINGS_FILE).unlink(missing_ok=True)
        else:
            records.write_settings(folder, {**handle.settings(), "form": records.FULL})
    return result


def patch_base(base: Any, folder: Any) -> None:
    """Patch a base as the folder of the adapter says that peft is about to put around it."""
    record = _beside_peft(folder, base)
    if record is not None:
        from llava_patch.patching import beside_peft

        beside_peft.patch_as(base, str(folder), record)


def _beside_peft(folder: Any, model: Any) -> dict[str, Any] | None:
    """The settings file of a folder that peft wrote a patched model's adapter into; CheckpointError: it is missing."""
    record = records.read_settings(folder) if isinstance(folder, (str, os.PathLike)) else None
    if record is None and isinstance(folder, (str, os.PathLike)) and handle_of(model) is None:
        trained = os.path.join(folder, records.TRAINED_FILE)
        if os.path.isfile(trained):
            raise CheckpointError(
                f"{trained}: {records.SETTINGS_FILE} beside it is missing, without which the model would be loaded "
                "without its patch: copy the folder again, or patch the model first"
            )
    return record if record is not None and record.get("form") == records.LORA else None


def load_stock(call: Loading, why: str) -> Any:
    """Load a model that cannot be patched (`why` ends a sentence about the patch) as its own from_pretrained does.

    HostError: the checkpoint carries a patch, or one is configured: it would be another model without it.
    """

    def refuse(model: Any = None, record: Any = None) -> None:
        raise HostError(f"{call.path} carries a patch, {why}")

    if configured := _configured():
        raise HostError(f"{configured} is configured, {why}")
    if (call.at_hand().record() or {}).get("form") in ("adapter", records.LORA):
        refuse()
    with _construction(call.cls, refuse):
        return call.stock()


def _configured() -> str:
    """What flags or environment ask for, in words."""
    asked = active.configuration()
    return "" if asked is None else ", ".join(map(str, asked.lasting().values()))


def _load_base_for(call: Loading, config: Any, carried: dict[str, Any]) -> Any:
    """Load a base under a patched checkpoint's config, as llava's builder does when it is given a model_base.

    The builder then fills in the checkpoint's own files (mm_projector.bin, non_lora_trainables.bin).
    """
    from llava_patch.patching import checkpoint
    from llava_patch.patching.patch import patch
    from llava_patch.settings.methods import from_record

    source = str(getattr(config, "_name_or_path", ""))
    own = records.config_record(call.cls.config_class.from_pretrained(call.path))
    stock = _stock_config(config)
    if own:  # the base was patched before: its added weights come first
        setattr(stock, records.CONFIG_KEY, own)
        stock._name_or_path = str(call.path)
        loaded = load(call._replace(kwargs={**call.kwargs, "config": stock}))
    else:  # loaded as it is, and patched afterwards
        with _unquantised(carried):
            loaded = call.stock(config=stock)
    handle = patch(_model_of(loaded), **from_record(carried, os.path.join(source, "config.json")))
    if (handle.trained_tower or carried.get("trained_tower")) and handle.anatomy.tower_apart:
        handle.trained_tower = True
        checkpoint.restore_tower_beside_lora(handle, source, required=not (own or {}).get("trained_tower"))
    return _finish(loaded)


def _finish(model: Any) -> Any:
    """Apply what flags or environment ask for to a model that is loaded for use; training waits for the Trainer."""
    asked = None if active.training() else active.configuration()
    if asked is not None and asked.probe is not None:  # a training recipe reused for evaluation
        _say_once("llava_patch: AuxiliaryProbe is a training loss, without effect here")
    if asked is not None and asked.lasting():
        from llava_patch.patching.patch import patch

        patch(_model_of(model), **asked.lasting())
    return model


def say_unpatched(cls: Any) -> None:
    """Say that a vision-language model of another kind is loaded without the patch that is configured."""
    sub_configs = getattr(getattr(cls, "config_class", None), "sub_configs", {})
    if not hasattr(cls, "generate") or "vision_config" not in sub_configs:
        return
    if configured := _configured():
        _say_once(
            f"llava_patch: {cls.__name__} is not a model that llava_patch knows, and is loaded without what is "
            f"configured: {configured}"
        )


def check_patched(model: Any) -> None:
    """Refuse to train a host's model without the patch that is configured (HostError)."""
    from llava_patch.hosts.anatomy import unwrap

    cls, configured = type(unwrap(model)), _configured()
    if configured and is_host(cls):
        raise HostError(
            f"{configured} is configured, but the Trainer got a {cls.__name__} that was not loaded with "
            "from_pretrained, where it would have been patched: load it so, or call patch(model, ...) first"
        )


def check_resumed(trainer: Any, folder: Any = None) -> None:
    """Refuse a stock model's run that goes on from a patched one's checkpoint (CheckpointError), whose weights differ.

    `folder`: what the Trainer's `train` got, a checkpoint or True for the last one.
    """
    if folder is True:
        from llava_patch.integrations.training.trainer_folder import newest_whole

        folder = newest_whole(Path(trainer.args.output_dir))
    record = records.checkpoint_record(folder) if isinstance(folder, (str, os.PathLike)) else None
    if record:
        raise CheckpointError(
            f"{folder} was written by a patched model, and this run's has no patch: configure what the run began with, "
            "or start into another --output_dir"
        )


@functools.lru_cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def _model_of(loaded: Any) -> Any:
    return loaded[0] if isinstance(loaded, tuple) else loaded  # with loading info, or without


def _stock_config(config: Any, base: str | None = None) -> Any:
    """A copy of a configuration without the patch it carries: the base is loaded as it is and patched afterwards.

    How the files of a `base` are quantised stands in its own config.json, whatever its adapter was trained on.
    """
    from llava_patch.hosts import compat

    config = copy.deepcopy(config)
    vars(config).pop(records.CONFIG_KEY, None)
    compat.choose_backend_again(config)
    if base is not None:
        vars(config).pop("quantization_config", None)
        own = type(config).get_config_dict(base)[0].get("quantization_config")
        if own is not None:
            config.quantization_config = own
    return config


@contextlib.contextmanager
def _construction(cls: Any, found: Callable[[Any, dict[str, Any]], None]) -> Iterator[None]:
    """While a checkpoint is loaded, call `found` with a model whose config carries a patch once it is constructed.

    The host's loader then fills modules that were added like any others: sharded files, device maps and precisions
    need no code of ours.
    """

    def init_and_tell(original: Callable[..., None], self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, config, *args, **kwargs)
        record = records.config_record(config)
        if type(self) is cls and record:
            found(self, record)

    with UndoStack() as undo:
        undo.wrap(cls, "__init__", init_and_tell)
        yield


@contextlib.contextmanager
def _unquantised(record: dict[str, Any] | None = None, tensors: Iterable[str] = ()) -> Iterator[None]:
    """While a model is loaded, keep from being quantised what its patch adds, widens or has trained.

    The patch is on the model already, is a checkpoint's `record`, or is configured; `tensors` are what will be put in.
    Files that hold integers are read as they are, and `patch` dequantises what it needs.
    """
    from llava_patch.hosts import compat

    asked = active.configuration()
    configured = {} if asked is None else asked.lasting()

    def names(stock: Callable[[Any], list[str]], model: Any, quantised: bool) -> list[str]:
        handle = handle_of(model)
        coming = [] if quantised else [record, configured, tensors]
        if handle is None and not any(coming):
            return stock(model)
        from llava_patch.hosts.anatomy import HANDLE
        from llava_patch.patching import floating
        from llava_patch.patching.handle import copyable

        kept = floating.modules(model, *(coming or (None, {}, ())))
        own = {} if handle is None else {HANDLE: None}
        with copyable(model), meanwhile(model, **own):  # up to 4.57 the model, whose copies are refused, is copied here
            return [*stock(model), *kept]

    with UndoStack() as undo:
        compat.keep_floating(names, undo)
        yield


def _patch_new(model: Any, record: dict[str, Any], device_map: dict[str, Any] | None = None) -> None:
    """Put the modules that a checkpoint's record names into its model, and the map of its weights, which follow."""
    from llava_patch.patching import placing
    from llava_patch.patching.patch import patch
    from llava_patch.settings.methods import from_record

    handle = patch(model, **from_record(record, "config.json"), loading=True)
    handle.trained_tower |= bool(record.get("trained_tower"))
    if device_map is not None:
        placing.complete(device_map, handle)
    if handle.anatomy.vision_model is None:  # comes later, and the checkpoint's own weights for it with it
        own = getattr(model, _IGNORED)
        own = [] if own is None else own  # a list up to 4.57, a set from 5.0
        setattr(model, _IGNORED, type(own)([*own, r"\bvision_tower\."]))
