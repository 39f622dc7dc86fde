"""A checkpoint on disk, read without loading a model: full ones of both hosts, and adapters over their base."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_patch.core.errors import CheckpointError
from llava_patch.core.records import CONFIG_KEY, FORMAT, base_of, read_settings
from llava_patch.core.weights import Tensors, locate, open_file, open_weights, read_json
from llava_patch.hosts import configs
from llava_patch.hosts import tensor_names as names
from llava_patch.hosts.anatomy import LLAVA
from llava_patch.patching import checkpoint as patched
from llava_patch.patching.keys import check_values
from llava_patch.settings.methods import from_record
from llava_patch.tools.convert import companions
from llava_patch.tools.convert.complete import check_complete, compare, expected_tower, shapes_of

logger = logging.getLogger("llava_patch")

_OTHER_CLIP_PARTS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint.

    Attributes:
        host: "llava" or "hf".
        config: its config.json, without our key.
        record: our settings ("format", "fusion", "routing", "pruning"); None for a stock checkpoint.
        tensors: neutral name: a function that reads it. On llava without the vision tower, unless the checkpoint's own
            weights are what its loader uses.
        sources: folders or hub names that its other files are taken from, the first one that has a file.
        tower_samples: what an adapter's fingerprint says of a tower that llava keeps in a folder of its own.
        files: what writes the files beside weights and configuration into a folder.
    """

    host: str
    config: dict[str, Any]
    record: dict[str, Any] | None
    tensors: Tensors
    sources: tuple[str, ...]
    tower_samples: dict[str, list[float]] = field(default_factory=dict)
    files: tuple[Callable[[Path], None], ...] = ()

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.sources[0]

    def methods(self) -> dict[str, Any]:
        """Its settings dataclasses by kind; none for a stock checkpoint."""
        return {} if self.record is None else from_record(self.record, self.name)

    def trains_tower(self) -> bool:
        """Whether its patch trained something in the vision tower."""
        fusion = self.methods().get("fusion")
        frozen_since = self.record is not None and bool(self.record.get("trained_tower"))
        return frozen_since or (fusion is not None and fusion.train_tower != "frozen")

    def reads_own_tower(self) -> bool:
        """Whether llava's loader takes the tower's weights from the checkpoint itself."""
        return self.trains_tower() or bool(self.config.get("unfreeze_mm_vision_tower"))

    def find(self, name: str) -> str | None:
        """The first of its folders that has this file."""
        return next((source for source in self.sources if locate(source, name) is not None), None)


def read(folder: str | os.PathLike[str], vision_tower: str | None = None) -> Checkpoint:
    """Read a full checkpoint, stock or patched, or an adapter together with its base.

    Args:
        folder: the checkpoint.
        vision_tower: where llava's tower is; None: where its config says.

    Raises:
        CheckpointError: no checkpoint, a tensor whose name is not known, an adapter whose base is gone or another one.
    """
    source = os.fspath(folder)
    if not os.path.isdir(source):
        raise CheckpointError(f"{source}: no such folder")
    config = read_json(source, "config.json")
    if config is None:
        raise CheckpointError(f"{source}: not a checkpoint, it has no config.json")
    host = configs.host_of(config, source)
    settings = read_settings(source)
    carried = config.pop(CONFIG_KEY, None)
    record = settings or carried
    if record is not None:
        known = ("format", "fusion", "routing", "pruning", "trained_tower")
        record = {k: record.get(k) for k in known if k in record}
        if record.get("format") == FORMAT and not any(
            record.get(k) for k in known[1:]
        ):  # a run with the auxiliary loss alone leaves a stock model
            record = None
    tower = vision_tower or config.get("mm_vision_tower", "")
    sources: tuple[str, ...] = (source,)
    samples: dict[str, list[float]] = {}
    if settings is not None and settings.get("form") == "adapter":
        base = base_of(source, settings)
        sources = (source, base)
        path = locate(source, patched.WEIGHTS_FILE)
        if path is None:
            raise CheckpointError(f"{source}: {patched.WEIGHTS_FILE} is missing")
        below = _neutral(open_weights(base), host, base)
        own = _neutral(open_file(path), host, source)
        if host == LLAVA:  # whatever a base says of the tower, llava's loader takes it from its own folder
            below = {k: v for k, v in below.items() if not k.startswith("tower.")}
            if any(k.startswith("tower.") for k in own):
                below |= tower_tensors(tower, configs.vision_config(tower))
        samples = {str(names.neutral(name, host)): values for name, values in settings.get("fingerprint", {}).items()}
        later = host == LLAVA and not any(k.startswith("tower.") for k in below)
        check_samples(below, {k: v for k, v in samples.items() if not (later and k.startswith("tower."))}, source)
        samples = {k: v for k, v in samples.items() if later and k.startswith("tower.")}
        tensors = below | own
    else:
        tensors = _neutral(open_weights(source), host, source)
    found = Checkpoint(host, config, record, tensors, sources, samples)
    found = replace(found, files=(lambda out: companions.copy(found, out),))
    if host == LLAVA and not found.reads_own_tower():
        found = replace(found, tensors={k: v for k, v in tensors.items() if not k.startswith("tower.")})
    check_complete(found, source, tower)
    return found


def _neutral(tensors: Tensors, host: str, source: str) -> Tensors:
    renamed: Tensors = {}
    for name, load in tensors.items():
        if names.is_computed(name):
            continue
        plain = names.neutral(name, host)
        if plain is None:
            raise CheckpointError(f"{source}: tensor {name} is not one that llava_patch knows where to put")
        renamed[plain] = load
    return renamed


def check_samples(tensors: Tensors, samples: dict[str, list[float]], source: str) -> None:
    """Compare an adapter's fingerprint with the base that it is put on.

    Args:
        tensors: the base's.
        samples: neutral name: sampled values.
        source: the adapter.

    Raises:
        CheckpointError: another base.
    """
    for name, values in samples.items():
        if name not in tensors:
            raise CheckpointError(f"{source}: made on a base with a tensor {name}, which its base does not have")
        check_values(name, tensors[name](), values, source)


def tower_tensors(source: str, vision: Any) -> Tensors:
    """The vision model's tensors of a CLIP tower folder or hub name, by neutral names.

    Raises:
        CheckpointError: a tensor that is missing or not known.
    """
    tensors = {
        f"tower.{name}": load
        for name, load in open_weights(source).items()
        if not name.startswith(_OTHER_CLIP_PARTS) and not names.is_computed(name)
    }
    compare(shapes_of(tensors), {f"tower.{k}": v for k, v in expected_tower(vision).items()}, source)
    return tensors


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, one perhaps rounded to the other's precision (llava casts its tower)."""
    narrow = min((one.dtype, other.dtype), key=lambda dtype: torch.finfo(dtype).bits)
    return one.shape == other.shape and torch.equal(one.to(narrow), other.to(narrow))


def same_tower(one: Tensors, other: Tensors) -> str | None:
    """The first tensor that differs between two towers; None when they are the same."""
    return next((name for name, load in one.items() if name not in other or not equal(load(), other[name]())), None)
