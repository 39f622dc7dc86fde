"""What a checkpoint's files say without its weights: config.json, its host, and the settings of our patch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llava_patch.core import stored
from llava_patch.core.errors import CheckpointError, HostError, brief, shown
from llava_patch.core.hub import adapter_folder
from llava_patch.core.records import ADAPTER, CONFIG_KEY, carried, find_base, read_settings
from llava_patch.core.weights import MEND, lacks_config, read_json
from llava_patch.hosts.anatomy import HOSTS, LLAVA
from llava_patch.hosts.host import HostFiles, made_of
from llava_patch.hosts.towers.layout import SEVERAL_SCALES


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of one checkpoint."""

    source: str  # folder or hub name; an adapter on the hub: its folder on this machine
    config: dict[str, Any]  # its config.json, without our key; empty where it has none
    host: str  # whose config.json it is, "llava" or "hf"; "" where there is none
    # The settings of our patch: of the folder's own settings file, else of its config.json; None: stock.
    record: dict[str, Any] | None

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter of ours, which needs its base."""
        return (self.record or {}).get("form") == ADAPTER

    @property
    def base(self) -> str | None:
        """The model below an adapter; None for everything else."""
        record = self.record or {}
        return (find_base(self.source, record) or str(record["base"])) if record.get("form") == ADAPTER else None


def look(source: str) -> CheckpointFiles:
    """Read what a folder or hub name has of the files of a checkpoint.

    CheckpointError: a damaged file, settings of another format, or the config.json of another model.
    """
    source = adapter_folder(source)
    config = read_json(source, "config.json")
    host = "" if config is None else host_of(config, source)
    record = read_settings(source) if os.path.isdir(source) else None
    own = carried(config or {}, f"{source}/config.json")
    plain = {key: value for key, value in (config or {}).items() if key != CONFIG_KEY}
    return CheckpointFiles(source, plain, host, record or own)


def read(source: str, what: str = "") -> CheckpointFiles:
    """The files of a checkpoint, which must have a config.json (else CheckpointError, that calls it `what`)."""
    found = look(source)
    if not found.host:
        raise lacks_config(source, what)
    return found


def host_of(config: dict[str, Any], source: str) -> str:
    """The host that a config.json is of, "llava" or "hf"; CheckpointError for another model, or damaged fields."""
    where = os.path.join(source, "config.json")
    known = isinstance(config.get("model_type", ""), str)
    if known and (name := next((name for name, (_, files) in HOSTS.items() if files.wrote(config)), None)) is not None:
        check_fields(config, where, _LLAVA_FIELDS if name == LLAVA else _HF_FIELDS)
        return name
    raise CheckpointError(
        f"{where}: model_type = {config.get('model_type')!r} is not a LLaVA that llava_patch knows (llava's "
        "LlavaLlamaForCausalLM or LlavaMistralForCausalLM, HF's LlavaForConditionalGeneration)"
    )


_LLAVA_FIELDS: dict[str, type | tuple[type, ...]] = {
    "mm_vision_tower": str, "mm_hidden_size": int, "mm_vision_select_layer": int, "mm_vision_select_feature": str,
    "mm_projector_type": str, "mm_patch_merge_type": str, "image_aspect_ratio": str,
}  # fmt: skip
_HF_FIELDS: dict[str, type | tuple[type, ...]] = {
    "text_config": dict, "vision_config": dict, "vision_feature_layer": (int, list),
    "vision_feature_select_strategy": str, "original_llava_config": dict,
}  # fmt: skip
_COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def check_fields(values: Mapping[str, Any], where: str, kinds: Mapping[str, type | tuple[type, ...]]) -> None:
    """Refuse fields of a config.json that are of other kinds than these, or sizes that are no positive integers.

    What a field that is missing or null stands for is transformers' business; CheckpointError names file and field.
    """
    for name, kind in kinds.items():
        if values.get(name) is not None:
            value = stored.field(values, name, kind, where)
            if isinstance(value, dict):
                check_fields(value, f"{where}: {name}", {})
    for name in _COUNTS:
        if values.get(name) is not None and stored.field(values, name, int, where) < 1:
            raise CheckpointError(f"{where}: {name} = {shown(values[name])}: expected a positive integer{MEND}")
    if "mm_vision_tower" in kinds and not values.get("mm_vision_tower"):
        wrong = (
            f"mm_vision_tower = {values.get('mm_vision_tower')!r}: expected the folder or hub name of a vision tower"
        )
        raise CheckpointError(f"{where}: {wrong}: write it there")


def files_of(host: str) -> HostFiles:
    """What is known of a host's checkpoints: the configurations of their parts, and the names of their tensors."""
    return HOSTS[host][1]


def skeleton(config: dict[str, Any], host: str) -> Any:
    """A host model without weights, on torch's meta device: every name and shape of it and its tower, and no memory.

    HostError: the host's package is not installed, or its vision tower's configuration is not there.
    """
    with torch.device("meta"), made_of("config.json"):
        return files_of(host).skeleton(config)


def tower_config(config: dict[str, Any], source: str) -> Any:
    """The configuration of the vision tower that llava's config.json names.

    CheckpointError where it is not there, HostError for one of several scales, about which it would not say enough.
    """
    from transformers import AutoConfig

    if config.get("s2"):
        raise HostError(f"{source}: {SEVERAL_SCALES.format('this')}")
    name = str(config["mm_vision_tower"])
    try:
        vision = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{source}: its vision tower {name} cannot be read ({brief(error)}): download it, or change "
            "mm_vision_tower in config.json to where it is"
        ) from error
    return getattr(vision, "vision_config", vision)
