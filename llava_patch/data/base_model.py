"""Which model a checkpoint is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llava_patch.core.errors import CheckpointError
from llava_patch.hosts import configs
from llava_patch.patching import checkpoint as patched

if TYPE_CHECKING:
    from llava_patch.data.loaded import LoadedCheckpoint


def base_of(checkpoint: str, given: str, setting: str) -> str:
    """The base to compare a checkpoint with: the one that was named, or the one that its record names.

    Args:
        checkpoint: folder or hub name.
        given: what was named; "": nothing.
        setting: how to name one, for errors ("BASE", "Drift.base").

    Raises:
        CheckpointError: none is known, or it is not there.
    """
    if given:
        configs.read(given, f"{setting} {given}")
        return given
    record = patched.read_settings(checkpoint) if Path(checkpoint).is_dir() else None
    named = (record or {}).get("base")
    if not named:
        why = "it is no adapter of llava_patch, so it names no base" if record is None else "its record names no base"
        raise CheckpointError(f"{checkpoint}: {why}: say with {setting} what to compare it with")
    if not Path(named).is_dir():
        raise CheckpointError(
            f"{checkpoint}: its record names {named} as its base, and there is no such folder here: say with {setting} "
            "where it is"
        )
    try:
        configs.read(named)
    except CheckpointError as error:  # LLaVA's training starts from a language model alone
        raise CheckpointError(
            f"{checkpoint}: its record names {named} as its base, which is no LLaVA with a vision tower and projector "
            f"of its own: say with {setting} what to compare it with"
        ) from error
    return str(named)


def load_base(name: str, device: str = "", dtype: str = "") -> "LoadedCheckpoint":
    """Load a base as its checkpoint is, without the patch that gin asks for on the checkpoint's side."""
    from llava_patch.data.loaded import load_subject
    from llava_patch.settings import active

    with active.without_patches():
        return load_subject(name, device=device, dtype=dtype)
