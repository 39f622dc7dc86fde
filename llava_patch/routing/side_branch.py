"""The side branch's layers: plain, whole copies of decoder layers, whatever the originals are wrapped in."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import nn

from llava_patch.errors import SettingError
from llava_patch.hosts import lora, zero


def copy_layers(layers: Iterable[nn.Module]) -> nn.ModuleList:
    """Copy decoder layers.

    Args:
        layers: the originals; they may be partitioned by DeepSpeed ZeRO-3 (then every rank must call this), and their
            Linear layers may be wrapped by peft's LoRA.

    Returns:
        Layers of the same dtype and device that share nothing with the originals: not partitioned (the engine does
        that when it takes the model over), and plain Linear layers with the LoRA update merged in, since the side
        branch trains in full.

    Raises:
        SettingError: quantised layers, which cannot train.
    """
    return nn.ModuleList(_copy(layer) for layer in layers)


def _copy(layer: nn.Module) -> nn.Module:
    with zero.gathered(layer.parameters()):
        # A copied parameter has the gathered values and none of DeepSpeed's attributes.
        twin = copy.deepcopy(layer)
    lora.merge(twin)
    for name, parameter in twin.named_parameters():
        if not parameter.is_floating_point():
            raise SettingError(
                f"the decoder's weights are quantised ({name} is {parameter.dtype}), but the side branch is a copy of "
                "a decoder layer that trains in full: load the model without quantisation (--bits 16)"
            )
    return twin
