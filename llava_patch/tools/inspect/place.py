"""Where a checkpoint's files are: a folder, or a model of the hub on this machine."""

from __future__ import annotations

import os

from llava_patch.core.errors import CheckpointError

_FILES = ("*.json", "*.safetensors", "*.bin", "*.model")


def folder_of(source: str, download: bool = False, setting: str = "") -> str:
    """The folder with a checkpoint's files.

    Args:
        source: a folder, or a hub name.
        download: fetch a hub model that is not on this machine; without it, its weights are never downloaded.
        setting: the option that named it, for errors; "": none.

    Raises:
        CheckpointError: neither is there.
    """
    if os.path.isdir(source):
        return source
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(source, allow_patterns=list(_FILES), local_files_only=not download)
    except (OSError, ValueError) as error:  # no such name, none of this machine, no network
        where = "the hub does not give it" if download else "it is not on this machine"
        raise CheckpointError(
            f"{setting} {source}: no such folder; as a hub name: {where}".strip()
            + ("" if download else f" (hf download {source})")
        ) from error
