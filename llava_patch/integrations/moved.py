"""Old import paths, which scripts may still have: `llava_patch.diagnostics.drift` is `llava_patch.measurements.drift`.

Loaded by the import hook when nothing else has found a module of ours. Such a module is empty: each name is looked up
where it is now when it is used, with a DeprecationWarning that says where.
"""

import contextlib
import importlib
import importlib.util
import warnings
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "auxiliary": ("integrations.training.auxiliary",),
    "checkpoint": ("patching.checkpoint",),
    "config": ("settings.gin_config",),
    "convert": ("tools.convert",),
    "diagnostics": (
        "measurements",
        *(
            f"measurements.{name}.measure"
            for name in ("attention_maps", "drift", "fusion_attention", "gradients", "reach", "saturation")
        ),
        "measurements.flops.result",
        "integrations.training.gradients",
        "data.examples",
    ),
    **{
        f"diagnostics.{name}": (
            f"measurements.{name}",
            f"measurements.{name}.measurement",
            f"measurements.{name}.measure",
        )
        for name in ("attention_maps", "drift", "fusion_attention")
    },
    **{
        f"diagnostics.{name}.result": (f"measurements.{name}.measurement",)
        for name in ("attention_maps", "drift", "fusion_attention", "reach")
    },
    "diagnostics.examples": ("data.examples",),
    "diagnostics.gradients": (
        "measurements.gradients",
        "measurements.gradients.measurement",
        "measurements.gradients.result",
        "measurements.gradients.decompose",
        "integrations.training.gradients",
    ),
    "diagnostics.gradients.settings": ("measurements.gradients.measurement",),
    "diagnostics.inputs": ("data.inputs",),
    "diagnostics.reach.compare": ("measurements.reach.measure", "measurements.reach.measurement"),
    "diagnostics.reach.settings": ("measurements.reach.measurement",),
    "diagnostics.saturation": (
        "measurements.saturation",
        "measurements.saturation.result",
        "measurements.saturation.measure",
    ),
    "fusion.taps": ("fusion.base",),
    "errors": ("core.errors",),
    "evaluation": ("integrations.lmms_eval",),
    "handle": ("patching.handle",),
    "inspection": ("tools.inspect",),
    "probe.data": ("data.readers",),
    "probe.fit": ("measurements.rprobe.fit",),
    "probe.output": ("measurements.rprobe.output",),
    "probe.settings": ("measurements.rprobe.settings",),
    "probe.subject": ("data.loaded",),
}
"""Old module: where its names are now. What lay in an old package and is not listed lies in the first of its places."""


def find_spec(name: str) -> ModuleSpec | None:
    """The import system's description of an old module, named in full; None for a name that never was one."""
    places = _places(name.partition(".")[2])
    with contextlib.suppress(ModuleNotFoundError):  # inside what is no package
        if places and all(map(importlib.util.find_spec, places)):
            return ModuleSpec(name, _Loader(places), is_package=True)
    return None


def _places(old: str) -> tuple[str, ...]:
    if old in MOVED:
        return tuple(f"llava_patch.{new}" for new in MOVED[old])
    package, _, child = old.rpartition(".")
    return tuple(f"{new}.{child}" for new in _places(package)[:1]) if package else ()


class _Loader(Loader):
    """Makes the empty module."""

    def __init__(self, places: tuple[str, ...]) -> None:
        self._places = places

    def exec_module(self, module: ModuleType) -> None:
        """Give it the look-up."""

        def __getattr__(name: str) -> Any:
            # `inspect` asks every module for `__file__`, also while torch loads: nothing may be imported for that.
            for place in () if name.startswith("__") else self._places:
                found = importlib.import_module(place)
                if not isinstance(getattr(found, name, found), ModuleType):
                    message = f"{module.__name__}.{name} has moved: import it from {place}"
                    warnings.warn(message, DeprecationWarning, stacklevel=2)
                    return getattr(found, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = __getattr__  # type: ignore[method-assign]
