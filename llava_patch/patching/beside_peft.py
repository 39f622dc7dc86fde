"""A patched HF model under peft: what peft's own files leave out of it, kept beside them and brought back.

A Trainer's run keeps what trains (`integrations.training.resume`), any other call of peft's `save_pretrained` whatever
an adapter of ours holds.

On `llava` its training script keeps it in files of its own, which its loader reads.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from llava_patch.core import records
from llava_patch.core.errors import CheckpointError, SilentFusionWarning
from llava_patch.core.files import atomic
from llava_patch.core.stored import check_values, read_tensors
from llava_patch.core.undo import holding
from llava_patch.hosts import lora, zero
from llava_patch.patching import checkpoint
from llava_patch.patching.handle import Handle, get_handle
from llava_patch.patching.patch import patch
from llava_patch.settings.methods import from_record

FILE = records.TRAINED_FILE

_kept_by_trainer: ContextVar[bool] = ContextVar("llava_patch_kept_by_trainer", default=False)


def kept_by_trainer() -> contextlib.AbstractContextManager[bool]:
    """Inside the block a Trainer's run, and not `save_adapter`, keeps what peft leaves out."""
    return holding(_kept_by_trainer, True)


def save_adapter(
    handle: Handle, model: Any, folder: str, adapters: Collection[str], writes: bool, save: Callable[[], Any]
) -> Any:
    """Call `save`, by which peft writes adapters of a patched model, and keep beside them what it leaves out.

    peft puts the adapter "default" into the folder, any other into one of its name there. `writes`: whether this
    process is the one that writes. CheckpointError: the weights are partitioned by DeepSpeed ZeRO-3.
    """
    if handle.anatomy.tower_apart or _kept_by_trainer.get():
        return save()
    if zero.is_partitioned(handle.model.parameters()):
        raise CheckpointError(
            "the weights are partitioned by DeepSpeed ZeRO-3, and peft's save_pretrained would write LoRA alone: save "
            "with trainer.save_model()"
        )
    if writes:
        record = settings_of(handle, model)
        tensors = {n: t for n, t in checkpoint.adapter_tensors(handle).items() if not lora.is_pefts(n)}
        for own in (Path(folder) / ("" if name == "default" else name) for name in adapters):
            own.mkdir(parents=True, exist_ok=True)
            write(own, tensors)
            records.write_settings(own, record, weights=own / FILE)
    return save()


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write what peft leaves out of a folder: `tensors` on the CPU, by the model's own names."""
    with atomic(folder / FILE) as temporary:
        save_file(dict(tensors), temporary, metadata={"format": "pt"})


def settings_of(handle: Handle, model: Any) -> dict[str, Any]:
    """What a folder's settings file says of a model that was trained, maybe inside peft."""
    if not (lora.has_lora(handle.model) or hasattr(model, "get_base_model")) or handle.anatomy.tower_apart:
        return {**handle.settings(), "form": "full"}
    base = str(getattr(handle.model.config, "_name_or_path", "") or "")
    return {**handle.settings(), "form": records.LORA, "base": base}


def patch_as(model: Any, folder: str, record: Mapping[str, Any]) -> Handle:
    """Patch a base, or what peft has made of it, as the settings file of an adapter's folder says, if it is not yet."""
    asked = from_record(record, os.path.join(folder, records.SETTINGS_FILE))
    handle = get_handle(model)
    if handle is None or handle.applied() != {kind: value for kind, value in asked.items() if value is not None}:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SilentFusionWarning)  # its weights follow
            handle = patch(model, **asked)
    return handle


def load_adapter(model: Any, folder: str, record: Mapping[str, Any], load: Callable[[], Any]) -> Any:
    """Call `load`, which brings peft's adapter from a folder into a model, and bring back what else was trained."""
    handle = patch_as(model, folder, record)
    result = load()
    path = Path(folder) / FILE
    tensors = {}
    if path.is_file():
        tensors = read_tensors(path, advice=": copy the folder again, or go back to an earlier checkpoint")
        check_values(tensors, path)
        records.check_weights(record, path)
    branch = {id(p) for p in handle.methods["routing"].parameters()} if "routing" in handle.methods else set()
    missing = [
        n for n, p in handle.model.named_parameters() if id(p) in branch and n not in tensors and not lora.is_pefts(n)
    ]
    if missing:
        raise CheckpointError(
            f"{path}: {missing[0]} is missing ({len(missing)} tensors), which was trained beside LoRA"
        )
    checkpoint.copy_by_name(handle.model, tensors, path)
    handle.trained_tower |= bool(record.get("trained_tower"))
    return result
