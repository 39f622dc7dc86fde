"""What a checkpoint's files say of its images, without its weights: image processor, patches, merged tokens, tiles."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava_patch import checkpoint
from llava_patch.errors import CheckpointError, HostError
from llava_patch.handle import CONFIG_KEY
from llava_patch.hosts import tiles, tower_models, towers
from llava_patch.hosts.anatomy import HF, LLAVA
from llava_patch.probe.transform import Transform


def read_transform(folder: str | Path, mode: str) -> Transform:
    """The probe's image transform of a checkpoint, as `make_transform` gives it for the loaded model.

    Args:
        folder: a full checkpoint of either host, stock or patched, or an adapter whose base is there.
        mode: one of `IMAGE_MODES`.

    Raises:
        CheckpointError: no checkpoint there, or its base or vision tower is gone.
        HostError: a model, tower or image processor that is not known, or `mode` "anyres" for a model without tiles.
    """
    folder = Path(folder)
    record = checkpoint.read_settings(folder) if folder.is_dir() else None
    if record is not None and record.get("form") == "adapter":
        base = Path(str(record["base"]))
        if not base.is_dir():
            raise CheckpointError(f"{folder}: its base {base} is no folder here: give --size and --patch instead")
    else:
        base = folder
    file = base / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{base}: not a checkpoint, it holds no config.json")
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    record = record or config.get(CONFIG_KEY)
    host, vision, processor = (_llava if "mm_vision_tower" in config else _hf)(base, config)
    shape = towers.shape_of(vision)
    fusion = checkpoint.methods(record, str(folder)).get("fusion") if record else None
    cell = shape.patch_size * getattr(fusion, "merge_size", 1)
    height, width = (n * shape.patch_size for n in shape.grid)
    if mode != "anyres":
        return Transform(processor, mode, height, width, cell)
    if not config.get("image_grid_pinpoints"):
        raise HostError(f'image mode "anyres": {folder} does not cut images into tiles')
    # The tiling asks an Anatomy for no more than this.
    parts: Any = SimpleNamespace(
        host=host,
        grid=shape.grid,
        patch_size=shape.patch_size,
        model=SimpleNamespace(config=SimpleNamespace(**config)),
    )
    return Transform(processor, mode, height, width, cell, tiles.make_tiling(parts, processor))


def _llava(base: Path, config: dict[str, Any]) -> tuple[str, Any, Any]:
    """(host, vision configuration, image processor) of the llava package's checkpoint: its tower lies elsewhere."""
    from transformers import AutoConfig

    name = str(config["mm_vision_tower"])
    try:
        vision = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{base}: its vision tower {name} cannot be read: {error}") from error
    vision = getattr(vision, "vision_config", vision)
    rows, _ = towers.shape_of(vision).grid
    side = rows * towers.shape_of(vision).patch_size
    return LLAVA, vision, tower_models.load_processor(name, vision, side)


def _hf(base: Path, config: dict[str, Any]) -> tuple[str, Any, Any]:
    """The same of Hugging Face's LLaVA."""
    from transformers import AutoConfig, AutoImageProcessor

    try:
        vision = getattr(AutoConfig.from_pretrained(base), "vision_config", None)
        processor = AutoImageProcessor.from_pretrained(base, use_fast=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{base}: its configuration or image processor cannot be read: {error}") from error
    if vision is None:
        raise HostError(f"{base}: a {config.get('model_type')} model: its config.json has no vision tower")
    return HF, vision, processor
