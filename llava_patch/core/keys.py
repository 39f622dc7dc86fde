"""Digests of plain values: what a file on disk depends on, as its name or inside it."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def digest(value: Any) -> str:
    """Hexadecimal digest of JSON values; equal values give equal digests in every process."""
    text = json.dumps(value, sort_keys=True, default=_named)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _named(value: Any) -> str:
    """What JSON has no form for (dtypes, enumerations, paths); an object without a text of its own is its class."""
    text = str(value)
    return type(value).__qualname__ if " at 0x" in text else text
