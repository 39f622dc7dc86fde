"""Where a checkpoint keeps the settings of its patch, read without loading anything that patches.

A folder's record says which version wrote it, and holds the checksum of its weights and of itself: no save that was
broken off, and no file of another save, can be taken for it.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from llava_patch.core.errors import CheckpointError, shown
from llava_patch.core.registry import KINDS, TRAINING_ONLY
from llava_patch.core.stored import checksum, first_unknown, numbers, read_object, sampled_checksum
from llava_patch.core.undo import holding
from llava_patch.core.version import __version__

CONFIG_KEY = "llava_patch"
"""A checkpoint's config.json carries its patch under this key."""
SETTINGS_FILE = "llava_patch.json"
"""An adapter carries it in this file."""
FORMAT = 1
ADAPTER, FULL, LORA = "adapter", "full", "lora"
"""Forms of a folder: what was added or trained; the whole model; peft's adapter and what was trained beside it."""
VERSION, BASE_FROM_HERE = "version", "base_from_here"
"""The version of llava_patch that wrote a record; for the base that it names, the path from the record's folder."""
CHECKSUM, WEIGHTS_CHECKSUM = "checksum", "weights_checksum"
"""Of the record itself (its place and its base's may change), and of the file of weights that it goes with."""
WEIGHTS_FILE = "llava_patch.safetensors"
"""An adapter's weights."""
LORA_FILE = "non_lora_trainables.bin"
"""What LLaVA's LoRA training writes of what trained beside LoRA."""
TRAINED_FILE = "llava_patch_trained.safetensors"
"""What trains beside peft's adapter, by the model's own names."""
UNFINISHED = "a save into this folder was broken off"
"""What config.json says of a patch while files are replaced."""
_MAY_CHANGE = ("base", BASE_FROM_HERE, CHECKSUM)
_FIELDS = (
    "format", VERSION, "form", "base", BASE_FROM_HERE, "fingerprint", "trained_tower", WEIGHTS_CHECKSUM, CHECKSUM,
    *KINDS,
)  # fmt: skip
_TEXTS = (VERSION, "form", "base", WEIGHTS_CHECKSUM, CHECKSUM)

_bases: ContextVar[Mapping[str, str] | None] = ContextVar("llava_patch_bases", default=None)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_settings(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The settings file of a checkpoint folder; None when there is none.

    CheckpointError: it is damaged, of another format, changed after it was written, or not what config.json says.
    """
    path = Path(directory) / SETTINGS_FILE
    if not path.is_file():
        if path.with_name(WEIGHTS_FILE).is_file():
            raise CheckpointError(
                f"{path}: is missing, which {WEIGHTS_FILE} there goes with: the save, or a copy, was broken off: save, "
                "or copy the folder, again"
            )
        return None
    record = read_object(path)
    check_record(record, str(path))
    _check_agrees(record, path)
    if record.get("form") == ADAPTER and (whole := next(filter(os.path.isfile, _whole(directory)), None)):
        raise CheckpointError(
            f"{path} is an adapter's, and {whole} beside it a whole model's: one was saved over the other: move one"
        )
    return record


def _whole(directory: str | os.PathLike[str]) -> list[str]:
    """Where a whole model's weights would lie, or their index."""
    files = ("model.safetensors", "pytorch_model.bin")
    return [os.path.join(directory, name + end) for name in files for end in ("", ".index.json")]


def checkpoint_record(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The settings that a checkpoint folder says it was written with, {} for none; None: it does not say."""
    record = read_settings(directory)
    config = Path(directory) / "config.json"
    if record is not None or not config.is_file():
        return record
    return carried(read_object(config), str(config)) or {}


def carried(config: Mapping[str, Any], source: str) -> dict[str, Any] | None:
    """The settings in a config.json that was read, checked; None when it has none."""
    record = config.get(CONFIG_KEY)
    if record is None:
        return None
    check_record(record, source)
    return dict(record)


def config_record(config: Any) -> dict[str, Any] | None:
    """The settings that a model configuration carries, checked; None when it has none."""
    record = getattr(config, CONFIG_KEY, None)
    if record is not None:
        check_record(record, os.path.join(str(getattr(config, "_name_or_path", "") or ""), "config.json"))
    return record


def check_record(record: Any, source: str) -> None:
    """Refuse a record that is damaged, of another format or version, or not as it was written (CheckpointError)."""
    if record == UNFINISHED:
        raise CheckpointError(
            f"{source}: {UNFINISHED} while files were replaced: save again, into this folder or another"
        )
    if not isinstance(record, Mapping):
        raise CheckpointError(f"{source}: its llava_patch settings are {shown(record)}, expected an object")
    by = f", written by version {shown(record[VERSION])}" if VERSION in record else ""
    if record.get("format") != FORMAT or isinstance(record.get("format"), bool):
        raise CheckpointError(
            f"{source}: llava_patch settings of format {shown(record.get('format'))}{by}; this version ({__version__}) "
            f"reads {FORMAT}: update llava_patch"
        )
    if (unknown := first_unknown(record, _FIELDS)) is not None:
        raise CheckpointError(
            f"{source}: {shown(unknown)} is unknown to this version of llava_patch ({__version__}){by}: update it"
        )
    for name in _TEXTS:
        if name in record and not isinstance(record[name], str):
            raise CheckpointError(f"{source}: {name} = {shown(record[name])}: expected text")
    if not isinstance(record.get(BASE_FROM_HERE, {}), Mapping) or not all(
        isinstance(way, str) for way in record.get(BASE_FROM_HERE, {}).values()
    ):
        raise CheckpointError(f"{source}: {BASE_FROM_HERE} = {shown(record[BASE_FROM_HERE])}: expected paths by base")
    for kind in KINDS:
        if not isinstance(record.get(kind), (Mapping, type(None))):
            raise CheckpointError(f"{source}: {kind} = {shown(record[kind])}: expected an object or null")
    if not isinstance(record.get("trained_tower", False), bool):
        raise CheckpointError(f"{source}: trained_tower = {shown(record['trained_tower'])}: expected true or false")
    if record.get("form", FULL) not in (ADAPTER, FULL, LORA):
        raise CheckpointError(f"{source}: form = {shown(record['form'])}: expected {ADAPTER}, {FULL} or {LORA}")
    if record.get("form") == ADAPTER:
        if not record.get("base"):
            raise CheckpointError(f"{source}: base is missing, the model that the adapter lies on: write it there")
        _check_fingerprint(record.get("fingerprint"), source)
    if {VERSION, CHECKSUM, WEIGHTS_CHECKSUM} & set(record) and record.get(CHECKSUM) != seal(record):
        raise CheckpointError(
            f"{source}: its settings were changed after they were written (only base may be), or half of it is of "
            "another save: take it from the copy that it came from, or save again"
        )


def _check_fingerprint(values: Any, source: str) -> None:
    sound = isinstance(values, Mapping) and all(numbers(sampled) for sampled in values.values())
    if not sound:
        raise CheckpointError(
            f"{source}: fingerprint = {shown(values)}: expected sampled values of its base's tensors, without which "
            "nothing tells whether a model is that base: take the file from the copy that it came from, or save again"
        )


def _check_agrees(record: Mapping[str, Any], path: Path) -> None:
    """Refuse a settings file beside a config.json that carries other settings: they are of two saves."""
    config = path.with_name("config.json")
    if not config.is_file() or record.get("form") == LORA:
        return
    other = carried(read_object(config), str(config))
    for kind in (kind for kind in KINDS if kind not in TRAINING_ONLY):
        there = None if other is None else other.get(kind)
        if record.get(kind) != there and (other is not None or VERSION in record):
            raise CheckpointError(
                f"{path} and config.json beside it disagree about {kind} ({shown(record.get(kind))} and "
                f"{shown(there)}): they are of two saves, or one was changed; save again"
            )


def check_weights(record: Mapping[str, Any], path: Path) -> None:
    """Refuse weights that are not those that a record was written with (CheckpointError).

    `path` is the file that an adapter's record goes with, or the folder of a whole model.
    """
    expected = record.get(WEIGHTS_CHECKSUM)
    if expected is not None and expected != weights_checksum(path):
        folder = path if path.is_dir() else path.parent
        raise CheckpointError(
            f"{path}: not the weights that {folder / SETTINGS_FILE} was written with: they are of another save, or a "
            "copy was not complete; copy the folder again, or save again"
        )


def weights_checksum(path: Path) -> str:
    """The checksum of a file of weights, all of it; of a folder's model*.safetensors, a few places of each tensor."""
    if not path.is_dir():
        return checksum(path)
    from llava_patch.core.files import digest

    return digest({file.name: sampled_checksum(file) for file in sorted(path.glob("model*.safetensors"))})


# --- writing ----------------------------------------------------------------------------------------------------------


def write_settings(directory: str | os.PathLike[str], record: Mapping[str, Any], weights: Path | None = None) -> None:
    """Write a checkpoint folder's settings file: `record`, the way to its base, which version wrote it, checksums.

    `weights` is the file of weights that it goes with, or the folder of a whole model's, as they are on the disk.
    """
    from llava_patch.core.files import write_text  # the hook reads records where nothing else of ours is loaded

    whole = {**record, VERSION: __version__}
    if whole.get("base"):
        whole |= named_base(str(whole["base"]), directory)
    if weights is not None:
        whole[WEIGHTS_CHECKSUM] = weights_checksum(weights)
    whole[CHECKSUM] = seal(whole)
    write_text(Path(directory) / SETTINGS_FILE, json.dumps(whole, indent=2) + "\n")


def seal(record: Mapping[str, Any]) -> str:
    """The checksum of a record: of all in it that does not change when folders are moved."""
    from llava_patch.core.files import digest

    return digest({name: value for name, value in record.items() if name not in _MAY_CHANGE})


# --- the base ---------------------------------------------------------------------------------------------------------


def named_base(base: str, directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What a record says of a base: its folder, also as a path from the record's folder, or its name on the hub."""
    if not os.path.isdir(base):
        return {"base": base}
    place = os.path.abspath(base)
    try:
        return {"base": place, BASE_FROM_HERE: {place: os.path.relpath(base, directory)}}
    except ValueError:  # on another drive
        return {"base": place}


def base_is(directory: str | os.PathLike[str], base: str) -> contextlib.AbstractContextManager[Any]:
    """Inside the block an adapter's base is the one that the user names, whatever its record says."""
    return holding(_bases, {**(_bases.get() or {}), os.path.realpath(directory): base})


def find_base(directory: str | os.PathLike[str], record: Mapping[str, Any]) -> str | None:
    """The folder or hub name of an adapter's base; None: it was a folder, and is not there.

    Where it was when the adapter was saved, or, where both were moved, where it lies from there.
    """
    if (given := (_bases.get() or {}).get(os.path.realpath(directory))) is not None:
        return given
    base = str(record.get("base") or "")
    if not base or os.path.isdir(base):
        return base
    beside = os.path.normpath(os.path.join(directory, record.get(BASE_FROM_HERE, {}).get(base, base)))
    if os.path.isdir(beside):
        return beside
    return None if os.path.isabs(base) else base


def base_of(directory: str | os.PathLike[str], record: Mapping[str, Any]) -> str:
    """The same, which must be there (else CheckpointError)."""
    base = find_base(directory, record)
    if base == "":
        raise CheckpointError(
            f'{directory}: its settings name no base: write the model below it as "base" into '
            f"{os.path.join(directory, SETTINGS_FILE)}"
        )
    if base is None:
        raise CheckpointError(
            f"{directory}: its base model {record['base']} is not there any more: say where it is with --base (of "
            f'commands that have it), or change "base" in {os.path.join(directory, SETTINGS_FILE)}'
        )
    return base
