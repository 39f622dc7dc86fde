"""Loading patched checkpoints through the hosts' own from_pretrained: full ones, adapters, and bases of LoRA runs."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

from llava_patch import startup
from llava_patch.errors import CheckpointError

_IGNORED = "_keys_to_ignore_on_load_unexpected"  # transformers' own list


def is_host(cls: Any) -> bool:
    """Whether a model class is one of the hosts'."""
    return hasattr(cls, "prepare_inputs_labels_for_multimodal") or any(
        c.__name__ in ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration") for c in cls.__mro__
    )


def load(original: Any, cls: Any, path: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Load a host model, with the patch that its checkpoint carries or that flags and environment ask for.

    Args:
        original: the stock from_pretrained.
        cls: the model class.
        path: checkpoint, as from_pretrained takes it.
        args: further arguments of from_pretrained.
        kwargs: likewise.

    Raises:
        CheckpointError: a patched checkpoint that lacks tensors, or whose base is gone.
    """
    from llava_patch import checkpoint, tower_weights
    from llava_patch.handle import get_handle

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
    vars(model).pop(_IGNORED, None)
    handle = get_handle(model)
    if handle is not None:
        missing = sorted(set(checkpoint.adapter_names(handle)) & set(info["missing_keys"]))
        if missing:
            raise CheckpointError(
                f"{path}: the checkpoint says it carries {handle!r} but lacks {missing[0]} ({len(missing)} tensors)"
            )
        if handle.trained_tower:
            tower_weights.restore(handle, path)
        handle.apply_freeze()
    _finish(model)
    return (model, info) if wants_info else model


def _load_base_for(
    original: Any, cls: Any, path: Any, config: Any, carried: dict, args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Load a base under a patched checkpoint's config, as llava's builder does when it is given a model_base.

    A stock base is loaded as it is and patched afterwards, one that carries a patch comes with it; the builder then
    fills in the checkpoint's own files (mm_projector.bin, non_lora_trainables.bin).
    """
    from llava_patch import checkpoint, tower_weights
    from llava_patch.handle import CONFIG_KEY
    from llava_patch.hosts.anatomy import LLAVA
    from llava_patch.patching import patch

    source = getattr(config, "_name_or_path", "config.json")
    own = checkpoint.config_record(cls.config_class.from_pretrained(path))
    stock = _stock_config(config)
    if own:  # the base was patched before: its added weights come first
        setattr(stock, CONFIG_KEY, own)
        stock._name_or_path = str(path)
        loaded = load(original, cls, path, args, {**kwargs, "config": stock})
    else:
        loaded = original(cls, path, *args, **{**kwargs, "config": stock})
    handle = patch(_model_of(loaded), **checkpoint.methods(carried, f"{source}/config.json"))
    if (handle.trained_tower or carried.get("trained_tower")) and handle.anatomy.host == LLAVA:
        handle.trained_tower = True
        tower_weights.restore_beside_lora(handle, source, required=not (own or {}).get("trained_tower"))
    return _finish(loaded)


def _finish(model: Any) -> Any:
    """Apply what flags or environment ask for to a model that is loaded for use; training waits for the Trainer."""
    asked = None if startup.training() else startup.configuration()
    if asked is not None and asked.probe is not None:  # a training recipe reused for evaluation
        _say_once("llava_patch: AuxiliaryProbe is a training loss, without effect here")
    if asked is not None and asked.lasting():
        from llava_patch.patching import patch

        patch(_model_of(model), **asked.lasting())
    return model


@functools.lru_cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def _model_of(loaded: Any) -> Any:
    """The model in what from_pretrained returned, with or without loading info."""
    return loaded[0] if isinstance(loaded, tuple) else loaded


def _stock_config(config: Any) -> Any:
    """A copy of a configuration without the patch it carries: the base is loaded as it is and patched afterwards."""
    from llava_patch.handle import CONFIG_KEY

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
            handle = patch(self, **checkpoint.methods(record, "config.json"), loading=True)
            handle.trained_tower |= bool(record.get("trained_tower"))
            if handle.anatomy.vision_model is None:  # comes later, and the checkpoint's own weights for it with it
                setattr(self, _IGNORED, [*(getattr(self, _IGNORED) or ()), r"\bvision_tower\."])

    cls.__init__ = __init__
    try:
        yield
    finally:
        if own:
            cls.__init__ = original
        else:
            del cls.__init__
