"""The head of the auxiliary loss on disk: beside a checkpoint, for the run that goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llava_patch.core.errors import CheckpointError
from llava_patch.core.files import atomic
from llava_patch.hosts import lora, zero
from llava_patch.probe.auxiliary.attach import HEAD

if TYPE_CHECKING:
    from llava_patch.patching.handle import Handle

FILE = "llava_patch_rprobe.safetensors"


def save(handle: "Handle", folder: Path, writes: bool) -> None:
    """Write the head; with weights that DeepSpeed ZeRO-3 has partitioned every rank must call this.

    Args:
        handle: of the model that trains.
        folder: a checkpoint's or the run's.
        writes: whether this rank writes.
    """
    from safetensors.torch import save_file

    auxiliary = handle.auxiliary
    if auxiliary is None or auxiliary.head is None:
        return
    partitioned = zero.is_partitioned(handle.model.parameters())
    if not writes and not partitioned:
        return
    tensors = {}
    for name, parameter in auxiliary.head.named_parameters():
        with zero.gathered([parameter]):
            if writes:
                tensors[name] = parameter.detach().to("cpu", copy=True).contiguous()
    fingerprint = _fingerprint(handle)
    if writes:
        about = {"settings": json.dumps(handle.settings()["probe"]), "fingerprint": json.dumps(fingerprint)}
        with atomic(folder / FILE) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt", **about})


def load(handle: "Handle", folder: Path) -> None:
    """Bring the head back from a checkpoint of the same run.

    Raises:
        CheckpointError: no head there, of another shape, or trained beside another model.
    """
    from safetensors import safe_open

    from llava_patch.patching.keys import check_fingerprint

    auxiliary = handle.auxiliary
    if auxiliary is None or auxiliary.head is None:
        return
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path}: the run goes on from a checkpoint without the auxiliary loss's head: it was trained without "
            "AuxiliaryProbe (start into another --output_dir), or the file is lost"
        )
    parameters = dict(auxiliary.head.named_parameters())
    with safe_open(path, framework="pt") as stream, torch.no_grad():
        check_fingerprint(handle.model, json.loads((stream.metadata() or {}).get("fingerprint", "{}")), path)
        there = {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118
        here = {name: tuple(zero.shape(p)) for name, p in parameters.items()}
        if there != here:
            different = sorted(n for n in {**there, **here} if there.get(n) != here.get(n))
            raise CheckpointError(
                f"{path}: {different[0]} has shape {there.get(different[0])}, the head of {HEAD} here has "
                f"{here.get(different[0])}: it belongs to another model"
            )
        for name, parameter in parameters.items():
            with zero.gathered([parameter], changed=True):
                parameter.copy_(stream.get_tensor(name))


def _fingerprint(handle: "Handle") -> dict[str, list[float]]:
    """Of the model beside the head, as a resumed run finds it.

    Beside LoRA the Trainer's checkpoints bring back LoRA's matrices alone, so only what does not train is compared.
    """
    from llava_patch.patching.keys import base_fingerprint

    beside_lora = lora.has_lora(handle.model)
    changed = {n for n, p in handle.model.named_parameters() if beside_lora and p.requires_grad}
    return base_fingerprint(handle.model, changed)
