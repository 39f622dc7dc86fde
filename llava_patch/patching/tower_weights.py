"""Trained vision-tower weights on `llava`, which loads its tower after the model, from the tower's own checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava_patch.core.errors import CheckpointError
from llava_patch.core.weights import open_weights
from llava_patch.hosts import zero
from llava_patch.hosts.anatomy import when_loaded

if TYPE_CHECKING:
    from llava_patch.patching.handle import Handle

_PART = "vision_tower."
LORA_FILE = "non_lora_trainables.bin"


def is_of_tower(name: str) -> bool:
    """Whether a tensor of this name is a `llava` vision tower's."""
    return f"model.{_PART}" in name


def of_tower(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a `llava` vision tower, by their names in the tower."""
    return {name.split(_PART, 1)[1]: tensor for name, tensor in tensors.items() if is_of_tower(name)}


def put(handle: "Handle", tensors: Mapping[str, Tensor], source: Path | str) -> None:
    """Put weights into the tower by their names there, now or once the host has loaded it; what is not named stays.

    Modifications: on `llava`, while the tower is not loaded yet, its instance attribute `load_model`.
    """

    def copy() -> None:
        tower = handle.anatomy.tower
        parameters, buffers = dict(tower.named_parameters()), dict(tower.named_buffers())
        wanted = {n: t for n, t in tensors.items() if n not in buffers}  # position numbers, which some versions save
        for name, tensor in wanted.items():
            if name not in parameters:
                raise CheckpointError(f"{source}: the vision tower has no tensor {name}")
            if zero.shape(parameters[name]) != tensor.shape:
                raise CheckpointError(
                    f"{source}: {name} has shape {tuple(tensor.shape)}, the vision tower's has "
                    f"{tuple(zero.shape(parameters[name]))}"
                )
        zero.copy_values(parameters, wanted)

    when_loaded(handle.anatomy, handle._undo, lambda _: copy())


def restore(handle: "Handle", folder: Path | str) -> None:
    """Bring back trained vision-tower weights from a full checkpoint; CheckpointError where it holds none."""
    if not handle.anatomy.tower_apart:
        return  # the tower is part of HF's state dict and was loaded with it
    tensors = of_tower({name: load() for name, load in open_weights(str(folder)).items() if is_of_tower(name)})
    if not tensors:
        raise CheckpointError(f"{folder}: its vision tower was trained, but the checkpoint holds no tower weights")
    put(handle, tensors, folder)


def restore_beside_lora(handle: "Handle", source: str, required: bool = True) -> None:
    """Bring back trained vision-tower weights from the file that LLaVA's LoRA script saves beside the adapter.

    LLaVA's own loader reads that file before there is a tower, and loses them without a word. They need not be there
    (`required`) when the base brought trained ones of its own; else CheckpointError.
    """
    from transformers.utils import cached_file

    path = cached_file(source, LORA_FILE, _raise_exceptions_for_missing_entries=False)
    # LLaVA's own file format; weights_only keeps a foreign pickle from running code.
    tensors = of_tower(torch.load(path, map_location="cpu", weights_only=True)) if path else {}
    if not tensors and not required:
        return
    if not tensors:
        lacks = "holds no tower weights" if path else "is missing"
        raise CheckpointError(f"{source}: its vision tower was trained, but {LORA_FILE} {lacks}")
    put(handle, tensors, f"{source}/{LORA_FILE}")
