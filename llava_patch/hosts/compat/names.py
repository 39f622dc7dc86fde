"""What tensors and settings are called, and how they are loaded by name."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from llava_patch.core.errors import HostError
from llava_patch.core.undo import UndoStack

T = TypeVar("T")


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """How `from_pretrained` is told a precision: `torch_dtype` up to 4.55, `dtype` from 4.56."""
    from transformers import PretrainedConfig  # this module is loaded while transformers itself is

    return {"dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype": dtype}


def stored_dtype(config: dict[str, Any]) -> str | None:
    """The precision that a config.json names: `torch_dtype` up to 4.55, `dtype` from 4.56."""
    return config.get("dtype", config.get("torch_dtype"))


def text_config(config: Any) -> Any:
    """The language model's part of a configuration, or the whole; later ones say it themselves."""
    own = getattr(config, "get_text_config", None)
    return getattr(config, "text_config", config) if own is None else own()


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

    Modifications: the static method `get_modules_to_not_convert` of its quantizers' base; up to 4.50, which has none,
    `replace_with_bnb_linear` of `transformers.integrations`, to refuse what it would quantise (HostError).
    """
    try:
        from transformers.quantizers.base import HfQuantizer
    except ImportError:
        HfQuantizer = None  # type: ignore[assignment, misc]
    if not hasattr(HfQuantizer, "get_modules_to_not_convert"):
        _refuse_to_quantise(names, undo)
        return
    stock = HfQuantizer.get_modules_to_not_convert

    def all_names(self: Any, model: Any, *args: Any, **kwargs: Any) -> list[str]:
        return names(lambda model: stock(model, *args, **kwargs), model, bool(self.pre_quantized))

    undo.set_attribute(HfQuantizer, "get_modules_to_not_convert", all_names)


def _refuse_to_quantise(names: Callable[..., list[str]], undo: UndoStack) -> None:
    from transformers import integrations

    def refused(replace: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        if names(lambda _: [], model, False):
            raise HostError(
                "a patched model is not loaded in 8 or 4 bit on this transformers, which would quantise what the patch "
                "adds: load it in 16 bit, or install transformers 4.57 or newer"
            )
        return replace(model, *args, **kwargs)

    undo.wrap(integrations, "replace_with_bnb_linear", refused)
