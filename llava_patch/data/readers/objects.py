"""Values out of JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_patch.core.errors import InputError
from llava_patch.probe.sample import Box


def load_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        InputError: it cannot be read, or is not JSON (names the line).
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def four_numbers(value: Any, where: str, expected: str) -> Box:
    """Four numbers of a JSON list.

    Raises:
        InputError: anything else.
    """
    sound = isinstance(value, (list, tuple)) and len(value) == 4
    if not sound or not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in value):
        raise InputError(f"{where} {value!r}: expected {expected}")
    a, b, c, d = (float(n) for n in value)
    return a, b, c, d
