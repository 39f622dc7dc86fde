"""When a finished section still holds: what its result depends on, as one digest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.core.keys import digest
from llava_patch.core.paths import named
from llava_patch.core.version import __version__
from llava_patch.core.weights import folder_of
from llava_patch.settings import active

if TYPE_CHECKING:
    from llava_patch.tools.report.context import Context
    from llava_patch.tools.report.section import Section

_MODEL_FILES = ("*.safetensors", "*.bin", "config.json", "llava_patch.json", "preprocessor_config.json")


def key(section: "Section", context: "Context") -> str:
    """Hexadecimal digest; it changes when checkpoint, base, data, settings, inputs or version change."""
    values = {
        "section": section.name,
        "version": __version__,
        "checkpoint": [named(context.checkpoint), _model(context.folder)],
        "base": [named(context.base), _model(folder_of(context.base))] if context.base else None,
        "data": [context.data, _stamp(Path(context.data.split("?")[0]))] if context.data else None,
        "question": context.question,
        "configured": configured(),
        "precision": [context.device, context.dtype],
        "settings": section.settings(context),
        "inputs": [[path, _stamp(Path(path))] for path in section.inputs(context)],
    }
    return digest(values)


def configured() -> list[str]:
    """The methods that gin puts on the checkpoint's model when it is loaded."""
    asked = active.configuration()
    return [] if asked is None else [f"{kind}: {value}" for kind, value in asked.lasting().items()]


def _model(folder: str) -> list[Any]:
    """Size and time of change of a model's files: weights of 13 GB are not read to see that they are the same."""
    files = sorted({file for pattern in _MODEL_FILES for file in Path(folder).glob(pattern)})
    return [[file.name, *_stamp(file)] for file in files]


def _stamp(path: Path) -> list[int]:
    try:
        about = path.stat()
    except OSError:
        return []
    return [about.st_size, about.st_mtime_ns]
