"""What a checkpoint's files say of its images, without its weights: image processor, patches, merged tokens, tiles."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava_patch.core import records
from llava_patch.core.errors import CheckpointError, HostError
from llava_patch.core.hub import adapter_folder
from llava_patch.core.weights import folder_of, lacks_config, read_json
from llava_patch.hosts import configs, tiles
from llava_patch.hosts.anatomy import HF, LLAVA
from llava_patch.hosts.towers import layout as towers
from llava_patch.hosts.towers import models as tower_models
from llava_patch.probe.transform import Transform, square_transform
from llava_patch.probe.window import TEXT_HEIGHT
from llava_patch.settings.methods import from_record


def read_transform(folder: str | Path, mode: str, text_height: float = TEXT_HEIGHT) -> Transform:
    """The probe's image transform in one of `IMAGE_MODES`, as `make_transform` gives it for the loaded checkpoint.

    The folder, or name of the hub, is a full checkpoint of either host, stock or patched, or an adapter whose base is
    there.

    CheckpointError: there is none, or its base or tower is gone; SettingError or HostError: it is none for the mode.
    """
    folder = Path(folder_of(adapter_folder(str(folder))))
    record = records.read_settings(folder)
    base = folder
    if record is not None and record.get("form") == records.ADAPTER:
        base = Path(records.find_base(folder, record) or record["base"])
        if not base.is_dir():
            raise CheckpointError(f"{folder}: its base {base} is no folder here: give --size and --patch instead")
    raw = read_json(str(base), "config.json") if base.is_dir() else None
    if raw is None:
        raise lacks_config(str(base))
    record = record or records.carried(raw, f"{base}/config.json")
    on_llava = "mm_vision_tower" in raw
    config, processor = _of_llava(raw, str(base)) if on_llava else _of_hf(raw, base)
    shape = towers.shape_of(config.vision_config)
    fusion = from_record(record, str(folder)).get("fusion") if record else None
    cell = shape.patch_size * getattr(fusion, "merge_size", 1)
    height, width = (n * shape.patch_size for n in shape.grid)
    if mode != "anyres":
        return square_transform(processor, mode, height, width, cell, text_height)
    if not (
        str(raw.get("image_aspect_ratio")).startswith("anyres") if on_llava else hasattr(config, "image_grid_pinpoints")
    ):
        raise HostError(f'image mode "anyres": {folder} does not cut images into tiles')
    # The tiling asks an Anatomy for no more than this.
    parts: Any = SimpleNamespace(host=LLAVA if on_llava else HF, grid=shape.grid, patch_size=shape.patch_size)
    parts.model = SimpleNamespace(config=config)
    return Transform(processor, mode, height, width, cell, tiles.make_tiling(parts, processor))


def _of_llava(raw: dict[str, Any], base: str) -> tuple[Any, Any]:
    """Configuration and image processor of the llava package's checkpoint, whose tower lies elsewhere."""
    vision = configs.tower_config(raw, base)
    shape = towers.shape_of(vision)
    processor = tower_models.load_processor(str(raw["mm_vision_tower"]), vision, shape.grid[0] * shape.patch_size)
    return SimpleNamespace(**{**raw, "vision_config": vision}), processor


def _of_hf(raw: dict[str, Any], base: Path) -> tuple[Any, Any]:
    """The same of Hugging Face's LLaVA; its configuration knows what config.json leaves out because it is usual."""
    from transformers import AutoConfig, AutoImageProcessor

    try:
        config = AutoConfig.from_pretrained(base)
        processor = AutoImageProcessor.from_pretrained(base, use_fast=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{base}: its configuration or image processor cannot be read: {error}") from error
    if getattr(config, "vision_config", None) is None:
        raise HostError(f"{base}: a {raw.get('model_type')} model: its config.json has no vision tower")
    return config, processor
