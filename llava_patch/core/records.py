"""Where a checkpoint keeps the settings of its patch, read without loading anything that patches."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_patch.core.errors import CheckpointError

CONFIG_KEY = "llava_patch"
"""A checkpoint's config.json carries its patch under this key."""
SETTINGS_FILE = "llava_patch.json"
"""An adapter carries it in this file."""
FORMAT = 1
LORA = "lora"
"""The form of a folder with peft's adapter and what was trained beside it; the others are "adapter" and "full"."""


def read_settings(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The settings file of a checkpoint folder, of a format that is known; None when there is none."""
    path = Path(directory) / SETTINGS_FILE
    if not path.is_file():
        return None
    record = read_json_file(path)
    check_format(record, str(path))
    return record


def checkpoint_record(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The settings that a checkpoint folder says it was written with, {} for none; None: it does not say."""
    record = read_settings(directory)
    config = Path(directory) / "config.json"
    if record is not None or not config.is_file():
        return record
    return read_json_file(config).get(CONFIG_KEY) or {}


def read_json_file(path: Path) -> dict[str, Any]:
    """What a JSON file of a checkpoint holds; CheckpointError: it is not valid."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error


def check_format(record: Mapping[str, Any], source: str) -> None:
    """Refuse settings of another format."""
    if record.get("format") != FORMAT:
        raise CheckpointError(
            f"{source}: llava_patch settings of format {record.get('format')!r}, this version reads {FORMAT}"
        )


def write_settings(directory: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Write a checkpoint folder's settings file."""
    from llava_patch.core.files import write_text  # the hook reads records where nothing else of ours is loaded

    write_text(Path(directory) / SETTINGS_FILE, json.dumps(record, indent=2) + "\n")


def base_of(directory: str | os.PathLike[str], record: Mapping[str, Any]) -> str:
    """The folder, which must be there, or the hub name of the base that an adapter lies on."""
    base = str(record["base"])
    if os.path.isabs(base) and not os.path.isdir(base):
        raise CheckpointError(
            f'{directory}: its base model {base} is not there any more; change "base" in '
            f"{os.path.join(directory, SETTINGS_FILE)} to where it is now"
        )
    return base


def config_record(config: Any) -> dict[str, Any] | None:
    """The settings that a model configuration carries; None when it has none."""
    return getattr(config, CONFIG_KEY, None)
