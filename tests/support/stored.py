"""Tiny models whose weights are offloaded or quantised."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import models
from tests.support.models import Batch, Host

EIGHT = {"load_in_8bit": True}
FOUR = {
    "load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float16, "bnb_4bit_use_double_quant": True,
    "bnb_4bit_quant_type": "nf4",
}  # fmt: skip
"""As llava's loader asks for 4 bit."""


def offload(host: Host, folder: Path | None = None) -> None:
    """Keep weights in a folder (None: on the CPU, as if there were a GPU) but while their modules are called.

    `llava` asks its token embedding and its tower where they are, so those stay.
    """
    import accelerate

    model: Any = host.model
    parts = [model]
    if host.name == "llava":
        inner = model.get_model()
        names = ("norm", "mm_projector", "mm_projector_stack", "side_branch")
        parts = [*inner.layers, *(getattr(inner, name) for name in names if hasattr(inner, name)), model.lm_head]
    for i, part in enumerate(parts):
        if folder is None:
            accelerate.cpu_offload(part, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(part, str(folder / str(i)), execution_device=torch.device("cpu"))


def device_map(host: Host, place: str) -> dict[str, str]:
    """A map that keeps the decoder's layers in one place, by their names, and all the rest on the CPU."""
    names = {id(module): name for name, module in host.model.named_modules()}
    layers = {names[id(layer)]: place for layer in host.decoder.layers}
    owners = (name.rpartition(".")[0] for name, _ in host.model.named_parameters())
    return layers | {name: "cpu" for name in owners if not name.startswith(tuple(f"{layer}." for layer in layers))}


def write(name: str, folder: Path) -> Path:
    """A model's files; widths are multiples of 64, by which bitsandbytes cuts its blocks."""
    vision, path = models.vision_config(), folder / name
    vision.hidden_size, vision.intermediate_size = 64, 128
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "vision_config", lambda: vision)
        patch.setitem(models.TEXT, "intermediate_size", 128)
        model: Any = models.hf_model() if name == "hf" else models.llava_model(folder)
    model.save_pretrained(path)
    return path


def read(name: str, path: Path, quantise: dict[str, Any] | None = None, **options: Any) -> Host:
    """A model in float16, quantised while it is loaded."""
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

    if quantise is not None:
        options["quantization_config"] = BitsAndBytesConfig(**quantise)
    if name == "hf":
        model: Any = LlavaForConditionalGeneration.from_pretrained(path, torch_dtype=torch.float16, **options)
    else:
        from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

        model = LlavaLlamaForCausalLM.from_pretrained(path, torch_dtype=torch.float16, **options)
        if not model.get_vision_tower().is_loaded:
            model.get_vision_tower().load_model()
        model.get_vision_tower().to(dtype=torch.float16)
    return Host(name, model.eval())


def batch(host: Host, samples: Iterable[Any]) -> Batch:
    """A batch whose pixels are float16."""
    made = host.batch(list(samples), "left")
    key = "pixel_values" if host.name == "hf" else "images"
    made.inputs[key] = made.inputs[key].half()
    return made


def classes(module: nn.Module) -> set[str]:
    """The classes of a module's Linear layers."""
    return {type(child).__name__ for child in module.modules() if isinstance(child, nn.Linear)}
