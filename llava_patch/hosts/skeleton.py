"""A host model without weights, from its configuration alone: every name and shape, and no memory."""

from __future__ import annotations

import copy
from typing import Any

import torch

from llava_patch.core.errors import HostError
from llava_patch.hosts.anatomy import HF
from llava_patch.hosts.towers import models as tower_models


def build(config: dict[str, Any], host: str) -> Any:
    """The model of a config.json on torch's meta device, with its vision tower.

    Args:
        config: the file's values, without our own key.
        host: "llava" or "hf".

    Raises:
        HostError: the host's package is not installed, or its vision tower's configuration is not there.
    """
    with torch.device("meta"):
        return _hf(config) if host == HF else _llava(config)


def _hf(config: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    values = copy.deepcopy(config)
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(values.pop("model_type"), **values))


def _llava(config: dict[str, Any]) -> Any:
    mistral = config.get("model_type") == "llava_mistral"
    try:
        if mistral:
            from llava.model.language_model.llava_mistral import LlavaMistralConfig as Config
            from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM as Model
        else:
            from llava.model.language_model.llava_llama import LlavaConfig as Config
            from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM as Model
    except ImportError as error:
        raise HostError(f"the llava package, whose checkpoint this is, cannot be imported ({error})") from error
    values = {k: v for k, v in copy.deepcopy(config).items() if k not in ("model_type", "architectures")}
    values["unfreeze_mm_vision_tower"] = False  # or the constructor would load the tower's weights
    try:
        model = Model(Config(**values))
    except (OSError, ValueError) as error:
        raise HostError(f"its vision tower {config.get('mm_vision_tower')} is not there ({error})") from error
    tower = model.get_vision_tower()
    tower.vision_tower = _tower(tower.vision_tower_name)
    tower.vision_tower.requires_grad_(False)  # as llava's own load_model does
    tower.is_loaded = True
    return model


def _tower(name: str) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = tower_models.read_config(name)
    if config is None:
        return CLIPVisionModel(CLIPVisionConfig.from_pretrained(name))
    return tower_models.model_class(config)(config)
