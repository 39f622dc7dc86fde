"""Where results go when no --output names a folder, `llava_patch_out/COMMAND/NAME`, and the page that lists them."""

import html
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from llava_patch.core.files import write_text

ROOT = Path("llava_patch_out")
"""In the working folder."""
PAGE = "index.html"
_LINKED = (".html", ".md", ".png", ".pdf", ".json")
"""What a row of the page links, in this order; a folder that has none of it holds no result yet."""
_MOST = 6
"""Files that a row links."""
_TRIES = 10
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem;color:#222}table{border-collapse:collapse}"
    "td,th{text-align:left;padding:.25rem 1.2rem .25rem 0;border-bottom:1px solid #ddd;vertical-align:top}"
)


def place(command: str, *names: str) -> Path:
    """The folder of a command's results for what it was run on: one checkpoint's name, or several."""
    plain = [re.sub(r"[^\w.,=+-]+", "_", name).strip("._") or "results" for name in names]
    return ROOT / command / "+".join(plain)[:100]


class _Entry(NamedTuple):
    command: str
    name: str
    changed: float  # Unix time of its newest file
    files: list[str]
    broken: str = ""  # why it cannot be listed


def write_index(written: Path) -> Path | None:
    """Write the page anew from what lies under `ROOT`, which nothing else writes; None: `written` lies elsewhere.

    Commands may end at the same time: a page is written until it says what lies there after it was written, so that the
    last one that is written lists everything, whoever wrote it.
    """
    if not ROOT.is_dir() or not written.resolve().is_relative_to(ROOT.resolve()):
        return None
    text = None
    for _ in range(_TRIES):  # a folder whose files change all the time must not hold this up
        now = _page(sorted(_entries(), key=lambda entry: (-entry.changed, entry.command, entry.name)))
        if now == text:
            break
        text = now
        write_text(ROOT / PAGE, text)
    return ROOT / PAGE


def _entries() -> Iterator[_Entry]:
    for command in _inside(ROOT):
        if not command.is_dir():
            continue
        try:
            folders = _inside(command)
        except OSError as error:
            yield _Entry(command.name, "", 0.0, [], type(error).__name__)
            continue
        for folder in folders:
            if folder.is_dir() or folder.is_symlink():
                entry = _entry(command.name, folder)
                if entry.files or entry.broken:
                    yield entry


def _entry(command: str, folder: Path) -> _Entry:
    try:
        found = [path for path in _inside(folder) if path.suffix in _LINKED and path.is_file()]
        changed = max((path.stat().st_mtime for path in found), default=0.0)
    except OSError as error:  # a link that leads nowhere, or somebody else's folder
        return _Entry(command, folder.name, 0.0, [], type(error).__name__)
    found.sort(key=lambda path: (_LINKED.index(path.suffix), path.name))
    return _Entry(command, folder.name, changed, [path.name for path in found])


def _inside(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _page(entries: Sequence[_Entry]) -> str:
    rows = [
        f"<tr><td>{html.escape(one.command)}</td><td>{_link(one.name, one.command, one.name, '')}</td>"
        f"<td>{_date(one)}</td><td>{_files(one)}</td></tr>"
        for one in entries
    ]
    head = "".join(f"<th>{name}</th>" for name in ("command", "checkpoint", "date", "open"))
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>llava_patch: results</title>\n'
        f"<style>{_STYLE}</style>\n<h1>Results</h1>\n<table>\n<tr>{head}</tr>\n"
        + "\n".join(rows)
        + "\n</table>\n</html>\n"
    )


def _date(entry: _Entry) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(entry.changed)) if entry.changed else ""


def _files(entry: _Entry) -> str:
    if entry.broken:
        return f"cannot be read ({html.escape(entry.broken)})"
    shown = [_link(name, entry.command, entry.name, name) for name in entry.files[:_MOST]]
    return ", ".join([*shown, *(["…"] if len(entry.files) > _MOST else [])])


def _link(text: str, *parts: str) -> str:
    return f'<a href="{"/".join(quote(os.fsencode(part)) for part in parts)}">{html.escape(text)}</a>'
