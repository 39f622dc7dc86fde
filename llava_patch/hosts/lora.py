"""LoRA layers that peft has put into a host model."""

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
        layer, active = child.get_base_layer(), not child.disable_adapters and not child.merged
        if (floating := plain(layer)) is not layer:
            for adapter in [a for a in child.active_adapters if a in child.lora_A] if active else ():
                if getattr(child, "use_dora", {}).get(adapter):
                    raise SettingError("DoRA on quantised layers cannot be merged: load the model in 16 bit")
                floating.weight.data += child.get_delta_weight(adapter).to(floating.weight)
        elif active:
            child.merge()
        setattr(parent, name, child.get_base_layer() if floating is layer else floating)
    return bool(wrapped)
