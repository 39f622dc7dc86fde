"""The log of a run that is being measured: one JSON object a line, readable while training goes on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_patch.core.errors import CheckpointError
from llava_patch.core.files import atomic, plain
from llava_patch.measurements.gradients.moments import Moments, Step
from llava_patch.measurements.gradients.settings import Gradients

LOG = "gradients.jsonl"
_KIND = "kind"
READING = ("transition_windows", "smoothness", "step_size")
"""Settings that say how the numbers are read, not what is measured: they may change afterwards."""


class StepLog:
    """Appends measured steps and windows to a file; its first line holds settings and facts of the run."""

    def __init__(self, path: Path, settings: Gradients, facts: dict[str, Any]) -> None:
        """Use `begin` or `resume`."""
        self.path = path
        self.settings = settings
        self.facts = facts

    @classmethod
    def begin(cls, folder: str | Path, settings: Gradients, facts: dict[str, Any]) -> "StepLog":
        """Start a log; one that is there already makes way for it.

        Args:
            folder: of the run.
            settings: of the measurement.
            facts: plain values that a reader should know: learning_rate, block, fusion, batch, checkpoint.
        """
        log = cls(Path(folder) / LOG, settings, plain(facts))
        _rewrite(log.path, [{_KIND: "run", "settings": asdict(settings), "facts": facts}])
        return log

    @classmethod
    def resume(cls, folder: str | Path, settings: Gradients, step: int, source: str | Path | None = None) -> "StepLog":
        """Go on with a log whose run goes on from a checkpoint: what was measured after that is taken out.

        Nothing is written where an error is raised.

        Args:
            folder: of the run.
            settings: of the measurement, as they were but for `READING`.
            step: number of the last training step that the checkpoint holds.
            source: folder of the log to go on with; None: the run's own.

        Raises:
            CheckpointError: no log, a damaged one, or one with other settings.
        """
        path = Path(folder if source is None else source) / LOG
        lines = read_lines(path)
        written = Gradients(**lines[0]["settings"])
        differing = [n for n in asdict(settings) if n not in READING and getattr(settings, n) != getattr(written, n)]
        if differing:
            name = differing[0]
            raise CheckpointError(
                f"{path} was written with Gradients.{name} = {getattr(written, name)!r}, not "
                f"{getattr(settings, name)!r}: keep the settings of a run that goes on, or move the file away"
            )
        kept = [entry for entry in lines[1:] if entry["last" if entry[_KIND] == "window" else "step"] <= step]
        log = cls(Path(folder) / LOG, settings, lines[0]["facts"])
        _rewrite(log.path, [{**lines[0], "settings": asdict(settings)}, *kept])
        return log

    def add(self, step: Step, moments: Moments | None = None) -> None:
        """Append a step and the window that it completed; on disk when this returns."""
        entries = [{_KIND: "step", **step.to_dict()}]
        if moments is not None:
            values = moments.to_dict(self.settings.smoothness, self.settings.step_size)
            entries.append({_KIND: "window", **values})
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, entries)))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a log, the run's first; a last line that is still being written is left out.

    Raises:
        CheckpointError: no log there, or a damaged one; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: no log of gradient statistics ({error.strerror})") from error
    whole = text[: text.rfind("\n") + 1].splitlines()
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(whole, 1):
        try:
            entry = json.loads(line)
            known = entry[_KIND] in ("run", "step", "window") and (entry[_KIND] == "run") == (number == 1)
        except (ValueError, TypeError, KeyError):
            known = False
        if not known:
            raise CheckpointError(f"{path}, line {number}: not an entry of gradient statistics")
        entries.append(entry)
    if not entries:
        raise CheckpointError(f"{path}: an empty log of gradient statistics")
    return entries


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(plain(entry), allow_nan=False) + "\n"


def _rewrite(path: Path, entries: list[dict[str, Any]]) -> None:
    with atomic(path) as temporary:
        temporary.write_text("".join(map(_line, entries)), encoding="utf-8")
