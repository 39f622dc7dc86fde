"""A saved patch on the Hugging Face hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_patch.core.errors import CheckpointError
from llava_patch.core.records import ADAPTER, find_base, read_settings
from llava_patch.patching import checkpoint, model_card
from llava_patch.patching.handle import Handle


def push(
    handle: Handle,
    repo_id: str,
    form: str = ADAPTER,
    base: str = "",
    measured: Mapping[str, Any] | None = None,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    **commit: Any,
) -> str:
    """Save into a folder that is gone afterwards, and upload it; see `Handle.push_to_hub`."""
    from huggingface_hub import HfApi

    _check_travels(handle, form, base)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as place:
        folder = checkpoint.save(handle, Path(place) / "saved", form, base, measured)
        card = folder / model_card.FILE
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        card.write_text(card.read_text(encoding="utf-8").replace(model_card.HERE, repository), encoding="utf-8")
        commit.setdefault(
            "commit_message", f"Upload {' and '.join(type(s).__name__ for s in handle.applied().values())}"
        )
        return str(api.upload_folder(repo_id=repository, folder_path=folder, **commit).commit_url)


def _check_travels(handle: Handle, form: str, base: str) -> None:
    """Refuse what names a folder of this machine, before anything is saved."""
    config = handle.model.config
    named = str(getattr(config, "_name_or_path", "") or "")
    record = read_settings(named) if os.path.isdir(named) else None
    if record is not None and record.get("form") == ADAPTER:
        named = find_base(named, record) or named
    if form == ADAPTER and not base and (not named or os.path.isdir(named)):
        where = (
            f"its base is {named}, a folder of this machine" if named else "the model does not say where it came from"
        )
        raise CheckpointError(
            f"{where}: say with base= what it is called on the hub, so that others can load the adapter"
        )
    tower = str(getattr(config, "mm_vision_tower", "") or "")
    if os.path.isdir(tower):
        raise CheckpointError(
            f"mm_vision_tower = {tower}, a folder of this machine: set model.config.mm_vision_tower to its name on the "
            "hub, so that others can load the model"
        )
