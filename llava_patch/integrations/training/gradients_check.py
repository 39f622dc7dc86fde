"""What training runs gradient statistics cannot measure."""

from __future__ import annotations

from typing import Any

from torch import nn

from llava_patch.core.errors import SettingError
from llava_patch.measurements.gradients.decompose import block_parameters, measured_block
from llava_patch.measurements.gradients.settings import Gradients

ZERO_STAGES = (0, 1, 2)


def check(model: nn.Module, arguments: Any, settings: Gradients) -> int:
    """Refuse what a run cannot measure, before anything is written.

    Args:
        model: what the Trainer gets, patched.
        arguments: the Trainer's arguments.
        settings: of the measurement.

    Returns:
        The number of the measured block.

    Raises:
        SettingError: names what stands against it.
        HostError: a tower that is not loaded or has only quantised weights.
    """
    block = measured_block(model, settings.block, settings.full)
    deepspeed = getattr(getattr(arguments, "hf_deepspeed_config", None), "config", None) or {}
    stage = deepspeed.get("zero_optimization", {}).get("stage", 0)
    if stage not in ZERO_STAGES:
        raise SettingError(
            f"Gradients needs whole weights on every rank, but DeepSpeed ZeRO stage {stage} cuts them up: use stage 2 "
            '(LLaVA\'s scripts/zero2.json; Flags.deepspeed = "./scripts/zero2.json")'
        )
    parallel = getattr(model, "tp_size", None) or getattr(arguments, "parallelism_config", None)
    against = {
        "--fsdp, which cuts weights up: use DeepSpeed ZeRO-2": getattr(arguments, "fsdp", None),
        f"one process on {arguments.n_gpu} GPUs (nn.DataParallel): launch with torchrun or deepspeed, or set "
        "CUDA_VISIBLE_DEVICES to one": arguments.n_gpu > 1,
        "--torch_compile, whose graphs would keep the taps as they are: leave it out": arguments.torch_compile,
        "tensor or context parallelism: use torchrun or DeepSpeed ZeRO-2": parallel,
        "DeepSpeed's own torch_autocast: use --bf16": deepspeed.get("torch_autocast", {}).get("enabled"),
        "apex: use --bf16": arguments.fp16 and getattr(arguments, "half_precision_backend", None) == "apex",
    }
    for what, there in against.items():
        if there:
            raise SettingError(f"Gradients does not work with {what}")
    block_parameters(model, block)
    return block
