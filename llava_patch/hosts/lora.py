"""What peft has put into a host model: LoRA layers, and copies of modules that train in full (`modules_to_save`)."""

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from llava_patch.core.errors import SettingError


def has_lora(model: nn.Module) -> bool:
    """Whether peft has put LoRA layers into the model."""
    return any("lora_" in name for name, _ in model.named_parameters())


def trains(model: nn.Module) -> bool:
    """Whether LoRA layers are there and train."""
    return any("lora_" in name and p.requires_grad for name, p in model.named_parameters())


def is_pefts(name: str) -> bool:
    """Whether a parameter, by its name, is one that peft's own files hold."""
    return "lora_" in name or ".modules_to_save." in name


_CHANGED = "_llava_patch_changed"


def note_change(original: Callable[..., Any], wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """The method `merge` or `unmerge` of peft's wrapper around a quantised layer, which quantises that layer anew.

    Integers do not show it: a small update may change few of them.
    """
    before = wrapper.get_base_layer().weight
    result = original(wrapper, *args, **kwargs)
    layer = wrapper.get_base_layer()
    if layer.weight is not before:
        setattr(layer, _CHANGED, True)
    return result


def changed(model: nn.Module) -> str | None:
    """A quantised layer that LoRA was merged into, by name, or None."""
    return next((name for name, module in model.named_modules() if hasattr(module, _CHANGED)), None)


Place = tuple[nn.Module, str, Any]
"""A module's parent, its name there, and the module."""


def copies(parent: nn.Module, name: str) -> list[Place]:
    """A child, or with peft's `modules_to_save` the copy that computes, other adapters' copies, and the original."""
    child: Any = getattr(parent, name)
    if "original_module" not in child._modules:
        return [(parent, name, child)]
    own = child.modules_to_save
    active = getattr(child, "active_adapters", None) or [child.active_adapter]  # peft 0.13 has one
    order = sorted(own, key=lambda adapter: adapter not in active)
    return [*((own, adapter, own[adapter]) for adapter in order), (child, "original_module", child.original_module)]


def first_linears(parent: nn.Module, name: str) -> list[Place]:
    """The first Linear of a child or of its children, and peft's matrices that take the same input; [] without one."""
    child = getattr(parent, name)
    if isinstance(child, nn.Linear):
        return [(parent, name, child)]
    if isinstance(getattr(child, "base_layer", None), nn.Linear):
        return [(child, "base_layer", child.base_layer), *((child.lora_A, n, a) for n, a in child.lora_A.items())]
    below = (first_linears(child, name) for name in child._modules)
    return next((found for found in below if found), [])


def unhook(module: nn.Module, hook: Any) -> None:
    """Remove a forward hook from a module, and from the copies that peft has made of it since."""
    hook.remove()
    for part in module.modules():
        part._forward_pre_hooks.pop(hook.id, None)
        part._forward_hooks.pop(hook.id, None)


def merge(module: nn.Module, plain: Callable[[Any], Any] = lambda layer: layer) -> bool:
    """Put plain layers with the active LoRA update in the place of peft's wrappers (in place); whether there were any.

    The module's weights must be whole. `plain` gives a layer in floating point for a quantised one, into which peft
    itself would merge with another rounding. SettingError: DoRA on quantised layers.
    """
    if "peft" not in sys.modules:  # then nothing can be wrapped
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    children: list[Any] = [(parent, *child) for parent in module.modules() for child in parent.named_children()]
    wrapped = [found for found in children if isinstance(found[2], BaseTunerLayer)]
    for parent, name, child in wrapped:
        layer, active = child.get_base_layer(), not child.disable_adapters
        if (floating := plain(layer)) is not layer:
            left = [a for a in child.active_adapters if a in child.lora_A and a not in child.merged_adapters]
            for adapter in left if active else ():
                if getattr(child, "use_dora", {}).get(adapter):
                    raise SettingError("DoRA on quantised layers cannot be merged: load the model in 16 bit")
                floating.weight.data += child.get_delta_weight(adapter).to(floating.weight)
        elif active:
            child.merge()
        setattr(parent, name, child.get_base_layer() if floating is layer else floating)
    return bool(wrapped)
