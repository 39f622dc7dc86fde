"""How many parameters a patch's settings leave trainable, from the configuration alone."""

from __future__ import annotations

from typing import Any

from llava_patch.core.records import CONFIG_KEY
from llava_patch.hosts import skeleton
from llava_patch.patching.patch import patch


def count(config: dict[str, Any], host: str, methods: dict[str, Any], stage1: bool = False) -> Any:
    """Patch the model without its weights and ask what trains.

    What the settings say nothing about counts as a training script would have it in LLaVA's stage 2: the decoder and
    the projector train, the vision tower does not.

    Args:
        config: config.json.
        host: "llava" or "hf".
        methods: keyword arguments of `patch`.
        stage1: as LLaVA's stage 1 has it (--tune_mm_mlp_adapter True): the decoder does not train.

    Raises:
        LlavaPatchError: the host or its vision tower is not there.
    """
    from llava_patch.tools.inspect.read import Share, role

    model = skeleton.build({k: v for k, v in config.items() if k != CONFIG_KEY}, host)
    handle = patch(model, **methods, loading=True)
    vision = handle.anatomy.vision_model
    if vision is not None and handle.fusion is None:
        vision.requires_grad_(False)
    if stage1:
        handle.anatomy.decoder.requires_grad_(False)
        handle.anatomy.lm_head.requires_grad_(False)
        for parameter in handle.adapter_parameters():  # llava's projector hangs in the decoder
            parameter.requires_grad_(True)
    handle.apply_freeze()
    trains = set(handle.trainable())
    parts: dict[str, int] = {}
    total = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if name in trains:
            part = role(name, host)
            parts[part] = parts.get(part, 0) + parameter.numel()
    stage = "1" if stage1 else "2"
    return Share(sum(parts.values()), total, parts, f"what the settings leave trainable in stage {stage}")


def total(config: dict[str, Any], host: str) -> int:
    """Parameters of a model, vision tower included, from its configuration alone.

    Raises:
        LlavaPatchError: the host or its vision tower is not there.
    """
    model = skeleton.build({k: v for k, v in config.items() if k != CONFIG_KEY}, host)
    return sum(parameter.numel() for parameter in model.parameters())
