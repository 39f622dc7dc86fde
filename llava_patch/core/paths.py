"""Where what is computed once and kept lies on disk."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "LLAVA_PATCH_CACHE"


def cache_folder() -> Path:
    """`$LLAVA_PATCH_CACHE`, or `llava_patch` in the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`)."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_patch"
