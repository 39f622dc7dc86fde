"""A checkpoint's sizes from its files, without its weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from llava_patch.core.errors import CheckpointError, HostError
from llava_patch.core.records import CONFIG_KEY, read_settings
from llava_patch.core.weights import read_json
from llava_patch.fusion.taps import Join, Taps, choose_taps
from llava_patch.hosts.anatomy import HF, LLAVA
from llava_patch.hosts.configs import host_of
from llava_patch.hosts.towers import layout as towers
from llava_patch.hosts.towers import models as tower_models
from llava_patch.measurements.flops.shape import DecoderShape, Linear, ModelShape, tower_shape
from llava_patch.settings.methods import FastV, Routing, from_record


def read_shape(checkpoint: str) -> tuple[ModelShape, Routing | None, FastV | None]:
    """A checkpoint's sizes, and the routing and pruning that it carries.

    Args:
        checkpoint: folder or hub name: a full checkpoint of either host, stock or patched, or an adapter whose base is
            there. Only its JSON files are read, and those of its vision tower.

    Raises:
        CheckpointError: no checkpoint there, or its base or tower is gone.
        HostError: a model or tower that is not known.
    """
    record = read_settings(checkpoint) if Path(checkpoint).is_dir() else None
    base = str(record["base"]) if record is not None and record.get("form") == "adapter" else checkpoint
    raw = read_json(base, "config.json")
    if raw is None:
        what = f"its base {base}" if base != checkpoint else "it"
        raise CheckpointError(f"{checkpoint}: not a checkpoint, {what} has no config.json")
    record = record or raw.get(CONFIG_KEY)
    methods = from_record(record, checkpoint) if record else {}
    host = host_of(raw, checkpoint)
    text, vision, select, drops, projector = (_llava if host == LLAVA else _hf)(base, raw)
    shape = towers.shape_of(vision)
    tower = tower_shape(_on_meta(vision, host))
    taps = None
    if methods.get("fusion") is not None:
        main = select if select >= 0 else shape.n_blocks + 1 + select
        taps = choose_taps(methods["fusion"], shape.n_blocks, main)
    prefix = tower.tokens - tower.patches
    dropped = (int(drops) if host == HF else prefix) if drops else 0
    projected = tower.tokens - dropped
    if taps is not None and not taps.keeps_tokens:
        projected = taps.tokens(shape.grid)
    stacked = len(taps.groups) if taps is not None and taps.join is Join.LAYERS else 0
    found = ModelShape(
        Path(checkpoint).name, host, DecoderShape.of(text), tower, _widened(projector, taps), projected, stacked,
    )  # fmt: skip
    return found, methods.get("routing"), methods.get("pruning")


def _on_meta(vision: Any, host: str) -> Any:
    """A vision tower without weights."""
    from transformers import AutoModel, CLIPVisionModel

    with torch.device("meta"):
        if vision.model_type in tower_models.CLIP:
            return CLIPVisionModel(vision)
        if host == LLAVA:
            return tower_models.model_class(vision)(vision)
        return AutoModel.from_config(vision)


def _widened(projector: tuple[Linear, ...], taps: Taps | None) -> tuple[Linear, ...]:
    """The projector with the columns that a fusion adds to its first layer."""
    if taps is None:
        return projector
    if not projector:
        raise HostError("the projector has no linear layer that a fusion could have widened")
    inputs, outputs = projector[0]
    return ((inputs * taps.columns * taps.merge_size**2, outputs), *projector[1:])


def _llava(base: str, raw: dict[str, Any]) -> tuple[Any, Any, int, bool, tuple[Linear, ...]]:
    """(decoder's and tower's configurations, selected layer, whether the front is dropped, projector)."""
    from transformers import AutoConfig

    name = str(raw["mm_vision_tower"])
    try:
        vision = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{base}: its vision tower {name} cannot be read: {error}") from error
    vision = getattr(vision, "vision_config", vision)
    width, hidden = int(raw["mm_hidden_size"]), int(raw["hidden_size"])
    kind = str(raw.get("mm_projector_type", "linear"))
    if kind == "identity":
        projector: tuple[Linear, ...] = ()
    else:
        depth = 1 if kind == "linear" else _depth(kind, base)
        projector = ((width, hidden), *((hidden, hidden),) * (depth - 1))
    patches_only = raw.get("mm_vision_select_feature", "patch") == "patch"
    return SimpleNamespace(**raw), vision, int(raw["mm_vision_select_layer"]), patches_only, projector


def _depth(kind: str, base: str) -> int:
    digits = kind.removeprefix("mlp").removesuffix("x_gelu")
    if not digits.isdigit():
        raise HostError(f"{base}: mm_projector_type = {kind!r} is not known: expected linear, mlpNx_gelu or identity")
    return int(digits)


def _hf(base: str, raw: dict[str, Any]) -> tuple[Any, Any, int, bool, tuple[Linear, ...]]:
    """The same of Hugging Face's LLaVA."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{base}: its configuration cannot be read: {error}") from error
    layer = config.vision_feature_layer
    width = towers.shape_of(config.vision_config).width * (1 if isinstance(layer, int) else len(layer))
    hidden = int(config.text_config.hidden_size)
    drops = config.vision_feature_select_strategy == "default"
    main = layer if isinstance(layer, int) else layer[-1]
    return config.text_config, config.vision_config, main, drops, ((width, hidden), (hidden, hidden))
