"""Adapters on the Hugging Face hub: the folder on this machine that an adapter's name stands for.

Imports nothing of the hub's client before a name is asked for: the start-up hook reads this file.
"""

from __future__ import annotations

import os
from typing import Any

OPTIONS = ("revision", "subfolder", "cache_dir", "token", "local_files_only")
"""What a host's `from_pretrained` may say of where a name of the hub is looked up."""
OF_THE_NAME = ("revision", "subfolder")
"""Those that hold for that name alone, not for the base below it."""
_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.md")


def adapter_folder(source: str, **options: Any) -> str:
    """The folder with an adapter's files: where `source` names one on the hub, a copy of them on this machine.

    Everything else is returned as it is: folders, other models of the hub, names that the hub does not know (whoever
    loads them says what is the matter).

    Args:
        source: folder or hub name.
        options: some of `OPTIONS`, as the hosts' `from_pretrained` takes them.
    """
    from llava_patch.core.records import SETTINGS_FILE

    if is_path(source):
        return source
    from huggingface_hub import hf_hub_download, snapshot_download

    below = options.pop("subfolder", "") or ""
    settings = f"{below}/{SETTINGS_FILE}" if below else SETTINGS_FILE
    try:
        hf_hub_download(source, settings, **options)
    except (OSError, ValueError):  # no such file, name or network, or no name of the hub at all
        return source
    patterns = [f"{below}/{pattern}" if below else pattern for pattern in _FILES]
    return os.path.join(snapshot_download(source, allow_patterns=patterns, **options), *filter(None, [below]))


def is_path(source: str) -> bool:
    """Whether a word can only be a path: it is there, or is spelled as no name of the hub is (one slash at most)."""
    spelled = source.startswith((".", "/", "~")) or source.endswith("/")
    return spelled or os.path.lexists(source) or not 1 <= len(source.replace("\\", "/").split("/")) <= 2 or not source
