"""What commands do with results: tables on the screen, and files that no other checkpoint's results replace."""

import dataclasses
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from llava_patch.core.errors import CheckpointError
from llava_patch.core.paths import named
from llava_patch.measurements.base import Result
from llava_patch.settings import active

R = TypeVar("R", bound=Result)
CONFIGURED = "configured_patch"


def configured_patch() -> dict[str, str]:
    """The methods that gin puts on the checkpoint, by kind, with the settings that are not the defaults; {}: none."""
    asked = active.configuration()
    return {} if asked is None else {kind: _worded(method) for kind, method in asked.lasting().items()}


def facts_of(checkpoint: str) -> dict[str, Any]:
    """What `check_results` compares, for a result's file: "checkpoint", and `CONFIGURED` where gin puts a patch on."""
    patch = configured_patch()
    return {"checkpoint": named(checkpoint), **({CONFIGURED: patch} if patch else {})}


def check_results(path: Path, sources: Sequence[str]) -> None:
    """Refuse to replace a file of other checkpoints' results, or of the same ones' under another configured patch."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or none that is worth keeping
        return
    if not isinstance(values, dict):
        return
    facts = values.get("facts", values)
    facts = facts if isinstance(facts, dict) else {}
    others, before = values.get("sources", [facts.get("checkpoint")]), facts.get(CONFIGURED) or {}
    if not isinstance(others, list) or not others or not all(isinstance(other, str) for other in others):
        return
    asked, now = [named(source) for source in sources], configured_patch()
    if [named(other) for other in others] == asked and before == now:
        return
    held, wanted = ", ".join(others), ", ".join(asked)
    if before != now:
        held, wanted = held + _with(before), wanted + _with(now)
    raise CheckpointError(f"{path} holds the results of {held}, not of {wanted}: give another folder with --output")


def _with(patch: dict[str, str]) -> str:
    return f" with {', '.join(patch.values())} of gin" if patch else " without a patch of gin"


def with_facts(result: R, checkpoint: str) -> R:
    """A result with what it was measured on among its facts (`facts_of`)."""
    return dataclasses.replace(result, facts={**facts_of(checkpoint), **result.facts})


def show(table: tuple[Sequence[str], Sequence[Sequence[str]]], title: str = "", notes: Sequence[str] = ()) -> None:
    """Print a measurement's table (head and rows) with a title above and notes below it.

    The first column is a name, the others are numbers; where they are too wide for the screen, titles of columns take
    several lines.
    """
    from rich.console import Console

    from llava_patch.core import terminal as screen

    console = Console()
    head, rows = table
    if screen.width_of(head, rows) > console.width:
        cells = [max((len(row[i]) for row in rows), default=1) for i in range(len(head))]
        head = [
            "\n".join(textwrap.wrap(name, max(width, 1), break_long_words=False, break_on_hyphens=False))
            for name, width in zip(head, cells, strict=True)
        ]
    screen.show(console, head, rows, notes, title)


def _worded(method: Any) -> str:
    """A method's settings that are not the defaults, so that a setting added later does not make it another one."""
    given = []
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value != default:
            given.append(f"{field.name}={value!r}")
    return f"{type(method).__name__}({', '.join(given)})"
