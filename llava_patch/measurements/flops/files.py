"""A checkpoint's sizes from its files, without its weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from llava_patch.core.errors import CheckpointError, HostError
from llava_patch.fusion.base import Join, Taps, choose_taps
from llava_patch.hosts import configs
from llava_patch.hosts.anatomy import HF, LLAVA
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
    below = files = configs.look(checkpoint)
    if files.base is not None:
        below = configs.look(files.base)
    if not below.host:
        what = "it" if files.base is None else f"its base {files.base}"
        raise CheckpointError(f"{checkpoint}: not a checkpoint, {what} has no config.json")
    methods = from_record(files.record, checkpoint) if files.record else {}
    host = below.host
    text, vision, select, drops, projector = (_llava if host == LLAVA else _hf)(below.source, below.config)
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
    vision = configs.tower_config(raw, base)
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
