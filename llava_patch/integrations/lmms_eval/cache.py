"""Keeps lmms-eval's response cache (`--use_cache`) from serving one patch's answers to another."""

from __future__ import annotations

from typing import Any

from llava_patch.core.errors import HostError

HASH = "_model_fingerprint_hash"


def mark(response_cache: Any, patch_name: str) -> None:
    """Put a patch's fingerprint into what the cache keys on.

    lmms-eval keys on the model's name and arguments, which are the same with and without a patch. Entries written
    under another fingerprint, or none, are not found any more; they stay where they are.

    Args:
        response_cache: lmms-eval's ResponseCache, or None when `--use_cache` is not given.
        patch_name: `patching.keys.patch_name` of the model, not empty.

    Raises:
        HostError: this version's cache has no place for it.
    """
    if response_cache is None:
        return
    current = getattr(response_cache, HASH, None)
    if not isinstance(current, str):
        raise HostError(
            "the response cache of this lmms-eval cannot be told about patches and would serve answers of another "
            "model: run without --use_cache"
        )
    if not current.endswith(patch_name):
        setattr(response_cache, HASH, f"{current}+llava_patch:{patch_name}")
