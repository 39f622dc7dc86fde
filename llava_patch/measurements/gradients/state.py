"""An unfinished window on disk, for a run that goes on from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from llava_patch.core.errors import CheckpointError
from llava_patch.core.files import atomic
from llava_patch.measurements.gradients.statistics import Window

STATE = "llava_patch_gradients.safetensors"


def save_window(window: Window, path: str | Path) -> Path:
    """Write a window's running sums atomically.

    Args:
        window: the sums; they stay on their device.
        path: a safetensors file (`STATE` in a checkpoint's folder).
    """
    from safetensors.torch import save_file

    tensors, values = window.state()
    with atomic(Path(path)) as temporary:
        held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(held, temporary, metadata={"format": "pt", "window": json.dumps(values)})
    return Path(path)


def load_window(path: str | Path, size: int, device: torch.device | str = "cpu") -> Window:
    """Read what `save_window` wrote.

    Args:
        path: the file.
        size: steps of a window in the settings of the run that goes on.
        device: of the gradients to come.

    Raises:
        CheckpointError: no such file, a damaged one, or one of windows of another length.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            values = json.loads((file.metadata() or {})["window"])
            names = file.keys()
            tensors = {name: file.get_tensor(name).to(device) for name in names}
        window = Window.restore(tensors, values)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: no running sums of gradient statistics ({error})") from error
    if window.size != size:
        raise CheckpointError(
            f"{path}: its windows have {window.size} steps, but Gradients.window = {size}: keep it at {window.size} "
            "for the run that goes on"
        )
    return window
