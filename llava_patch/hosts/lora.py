"""LoRA layers that peft has put into a host model."""

from __future__ import annotations

import sys

from torch import nn


def has_lora(model: nn.Module) -> bool:
    """Whether peft has put LoRA layers into the model."""
    return any("lora_" in name for name, _ in model.named_parameters())


def trains(model: nn.Module) -> bool:
    """Whether LoRA layers are there and train."""
    return any("lora_" in name and p.requires_grad for name, p in model.named_parameters())


def merge(module: nn.Module) -> bool:
    """Put plain layers, the active LoRA update merged in, in the place of peft's wrappers; whether there were any.

    Changes the module in place; its weights must be whole.
    """
    if "peft" not in sys.modules:  # then nothing can be wrapped
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, BaseTunerLayer)
    ]
    for parent, name, child in wrapped:
        if not child.disable_adapters:
            child.merge()
        setattr(parent, name, child.get_base_layer())
    return bool(wrapped)
