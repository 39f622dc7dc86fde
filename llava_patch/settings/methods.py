"""Settings of every method as frozen dataclasses; checks that need no model happen here.

Imports neither torch nor gin, so that `import llava_patch` stays cheap.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from llava_patch.core.errors import SettingError
from llava_patch.settings.auxiliary import AuxiliaryProbe
from llava_patch.settings.fusion import DeepStack, DenseConnector, DirectFusion, Fusion, SkipLinks, differs
from llava_patch.settings.routing import AUTO, FREEZE_STRATEGIES, LEARNING_VARIANTS, VARIANTS, FastV, Routing

__all__ = [
    "AUTO",
    "FREEZE_STRATEGIES",
    "FUSIONS",
    "LEARNING_VARIANTS",
    "METHODS",
    "VARIANTS",
    "AuxiliaryProbe",
    "DeepStack",
    "DenseConnector",
    "DirectFusion",
    "FastV",
    "Fusion",
    "Routing",
    "SkipLinks",
    "differs",
    "from_dict",
    "to_dict",
]

FUSIONS: tuple[type[Fusion], ...] = (SkipLinks, DenseConnector, DirectFusion, DeepStack)
METHODS: dict[str, Any] = {cls.__name__: cls for cls in (*FUSIONS, Routing, FastV, AuxiliaryProbe)}


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def to_dict(settings: Any) -> dict[str, Any]:
    """Turn a settings dataclass into plain JSON values, with its class name under "method"."""
    values = {f.name: _plain(getattr(settings, f.name)) for f in dataclasses.fields(settings)}
    return {"method": type(settings).__name__, **values}


def from_dict(values: dict[str, Any], source: str) -> Any:
    """Rebuild a settings dataclass from `to_dict`'s output.

    Args:
        values: the dictionary, with the class name under "method".
        source: file that it came from, for the error message.

    Raises:
        SettingError: unknown method or field, naming both and the file.
    """
    values = dict(values)
    name = values.pop("method", None)
    if name not in METHODS:
        raise SettingError(f"{source}: unknown method {name!r}; this version knows {', '.join(METHODS)}")
    cls = METHODS[name]
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise SettingError(
            f"{source}: {name} has no setting {', '.join(unknown)}; saved by a newer version of llava_patch?"
        )
    if name == "Routing" and values.get("split") == AUTO:
        raise SettingError(
            f'{source}: Routing.split = "{AUTO}" in a saved record; a record always holds the layer number: '
            "the file was changed by hand; write the number there"
        )
    return cls(**{k: _tuples(v) for k, v in values.items()})
