"""Lines of text files of unknown origin."""

from __future__ import annotations

import re
from pathlib import Path

from llava_patch.core.errors import InputError


def numbered_lines(path: Path, encoding: str | None = None) -> list[tuple[int, str]]:
    """(line number from 1, line) of every line that is not blank.

    Args:
        path: a text file; CRLF, LF and CR end a line, nothing else does (`str.splitlines` would split more).
        encoding: None: UTF-8, UTF-16 with a byte order mark, else cp1252.

    Raises:
        InputError: the file cannot be read or decoded.
    """
    try:
        raw = path.read_bytes()
        text = raw.decode(encoding) if encoding else decode(raw)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    return [(n, line) for n, line in enumerate(re.split(r"\r\n|\n|\r", text), 1) if line.strip()]


def decode(raw: bytes) -> str:
    """Text of unknown encoding; every sequence of bytes has an answer."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return raw.decode("utf-16", errors="replace")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        # cp1252 leaves five bytes undefined, latin-1 none; elsewhere they agree on letters.
        try:
            return raw.decode("cp1252")
        except UnicodeDecodeError:
            return raw.decode("latin-1")
