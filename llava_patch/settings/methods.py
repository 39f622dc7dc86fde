"""Settings of every method by name, and as JSON values; `core.registry` lists them.

A class is loaded on first use (`from llava_patch.settings.methods import SkipLinks`), from the folder of its method.
Imports neither torch nor gin, so that `import llava_patch` stays cheap.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llava_patch.core import registry
from llava_patch.core.errors import SettingError, shown
from llava_patch.core.records import check_record
from llava_patch.settings.routing import AUTO as AUTO
from llava_patch.settings.routing import LEARNING_VARIANTS as LEARNING_VARIANTS
from llava_patch.settings.routing import VARIANTS as VARIANTS
from llava_patch.settings.routing import Routing as Routing

if TYPE_CHECKING:
    from llava_patch.fusion.deep_stack import DeepStack as DeepStack
    from llava_patch.fusion.dense_connector import DenseConnector as DenseConnector
    from llava_patch.fusion.direct_fusion import DirectFusion as DirectFusion
    from llava_patch.fusion.skip_links import SkipLinks as SkipLinks
    from llava_patch.routing.fastv import FastV as FastV
    from llava_patch.routing.pru_merge import PruMerge as PruMerge
    from llava_patch.routing.pyramid_drop import PyramidDrop as PyramidDrop
    from llava_patch.routing.sparse_vlm import SparseVLM as SparseVLM
    from llava_patch.routing.vision_zip import VisionZip as VisionZip
    from llava_patch.settings.auxiliary import AuxiliaryProbe as AuxiliaryProbe


def __getattr__(name: str) -> Any:
    """Load a method's settings class on first use."""
    if name not in registry.METHODS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return registry.load(registry.METHODS[name])


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def to_dict(settings: Any) -> dict[str, Any]:
    """Turn a settings dataclass into plain JSON values, with its class name under "method"."""
    return {"method": type(settings).__name__, **json.loads(json.dumps(dataclasses.asdict(settings)))}


def from_dict(values: Mapping[str, Any], source: str) -> Any:
    """Rebuild a settings dataclass from `to_dict`'s output; SettingError names `source` and what is unknown."""
    values = dict(values)
    name = values.pop("method", None)
    if name not in registry.METHODS:
        raise SettingError(f"{source}: unknown method {shown(name)}; this version knows {', '.join(registry.METHODS)}")
    cls = registry.load(registry.METHODS[name])
    if unknown := sorted(set(values) - {f.name for f in dataclasses.fields(cls)}):
        raise SettingError(
            f"{source}: {name} has no setting {', '.join(unknown)}; saved by a newer version of llava_patch?"
        )
    try:
        settings = cls(**{k: _tuples(v) for k, v in values.items()})
    except SettingError as error:
        raise SettingError(f"{source}: {error}") from error
    if hasattr(settings, "check_saved"):
        settings.check_saved(source)
    return settings


def from_record(record: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The settings dataclasses that a checkpoint's record holds, as keyword arguments of `patch`.

    CheckpointError: a record of a newer format. SettingError: an unknown method or field. Both name `source`.
    """
    check_record(record, source)
    lasting = (kind for kind in registry.KINDS if kind not in registry.TRAINING_ONLY)
    return {kind: from_dict(record[kind], source) for kind in lasting if record.get(kind)}
