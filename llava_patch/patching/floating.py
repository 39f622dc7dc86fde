"""What must stay in floating point when a model is quantised while it is loaded: what is added, widened or was trained.

The rest is quantised as the user asks. That is decided here and not by the user's `llm_int8_skip_modules`.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llava_patch.core.stored import read_shapes
from llava_patch.hosts import anatomy as anatomy_module
from llava_patch.hosts.anatomy import get_handle
from llava_patch.patching.checkpoint import WEIGHTS_FILE
from llava_patch.routing.side_branch import SIDE_BRANCH
from llava_patch.settings.methods import from_record


def tensors_in(folder: str | os.PathLike[str]) -> list[str]:
    """The names of the tensors that an adapter brings."""
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        return []  # loading it says so
    return list(read_shapes(path, advice=": copy the folder again, or save again")[0])


def modules(
    model: Any, record: Mapping[str, Any] | None, configured: Mapping[str, Any], tensors: Iterable[str]
) -> list[str]:
    """Names of a model's modules that must not be quantised.

    The patch is on the model, is in a checkpoint's `record` or `configured`; `tensors` will be put in.
    """
    handle, record = get_handle(model), record or {}
    settings = {**configured, **from_record(record, "config.json")} if record else dict(configured)
    trained_tower = bool(record.get("trained_tower"))
    if handle is not None:
        settings |= handle.applied()
        trained_tower |= handle.trained_tower
    names = {id(module): name for name, module in model.named_modules()}
    found = anatomy_module.find(model)
    parts = [getattr(found.decoder, SIDE_BRANCH, None)]
    if (fusion := settings.get("fusion")) is not None:
        parts += [found.projector, getattr(found.projector_owner, found.stack_name, None)]
        trained_tower |= fusion.train_tower != "frozen"
    if trained_tower:
        parts.append(found.tower)
    kept = [names[id(part)] for part in parts if id(part) in names]
    return [*kept, *(name.removesuffix(".weight") for name in tensors if name.endswith(".weight"))]
