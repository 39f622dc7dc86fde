"""The log of a run that is being measured: one JSON object a line, readable while training goes on."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_patch.core.errors import CheckpointError, LlavaPatchError, brief
from llava_patch.core.files import plain, storage_errors, write_text
from llava_patch.core.stored import UNREADABLE, is_finite
from llava_patch.measurements.gradients.measurement import Gradients
from llava_patch.measurements.gradients.moments import Moments, Step

LOG = "gradients.jsonl"
ADVICE = ": go on from an earlier checkpoint, or delete the file to measure again"
_KIND = "kind"
READING = ("stop", "transition_windows", "smoothness", "step_size")
"""Settings that say how far a run goes or how numbers are read, not what is measured: they may change afterwards."""


class StepLog:
    """Appends measured steps and windows to a file; its first line holds settings and facts of the run."""

    def __init__(
        self, folder: str | Path, settings: Gradients, facts: dict[str, Any], kept: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Start a run's log, with entries that are kept, in the place of one that is there already."""
        self.path, self.settings, self.facts = Path(folder) / LOG, settings, plain(facts)
        write_text(self.path, _lines([{_KIND: "run", "settings": asdict(settings), "facts": facts}, *kept]))

    @classmethod
    def resume(cls, folder: str | Path, settings: Gradients, step: int, source: str | Path | None = None) -> "StepLog":
        """Go on with a log (of the folder `source`; None: the run's own) whose run goes on from a checkpoint.

        What was measured after its last training step, `step`, is taken out. An error leaves all as it is.

        Raises:
            CheckpointError: no log, a damaged one, or one with settings that are others, but for `READING`.
        """
        path = Path(folder if source is None else source) / LOG
        header, *entries = read_lines(path)
        written = _settings_of(header, path)
        for name, value in asdict(settings).items():
            if name not in READING and value != getattr(written, name):
                raise CheckpointError(
                    f"{path} was written with Gradients.{name} = {getattr(written, name)!r}, not {value!r}: keep the "
                    "settings of a run that goes on, or move the file away"
                )
        kept = [entry for entry in entries if entry["last" if entry[_KIND] == "window" else "step"] <= step]
        return cls(folder, settings, header["facts"], kept)

    def add(self, step: Step, moments: Moments | None = None) -> None:
        """Append a step and the window that it completed; on disk when this returns."""
        entries = [{_KIND: "step", **step.to_dict()}]
        if moments is not None:
            values = moments.to_dict(self.settings.smoothness, self.settings.step_size)
            entries.append({_KIND: "window", **values})
        with storage_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_lines(entries))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a log (CheckpointError: it is damaged), the run's first; a line being written is left out."""
    try:
        text = path.read_text(encoding="utf-8")
    except UNREADABLE as error:
        why = getattr(error, "strerror", None) or brief(error)
        raise CheckpointError(f"{path}: no log of gradient statistics ({why}){ADVICE}") from error
    whole = text[: text.rfind("\n") + 1].splitlines()
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(whole, 1):
        try:
            entry = json.loads(line)
            known = _NEEDED[entry[_KIND]](entry) and (entry[_KIND] == "run") == (number == 1)
        except (ValueError, TypeError, LookupError, RecursionError):
            known = False
        if not known:
            raise CheckpointError(f"{path}, line {number}: not an entry of gradient statistics{ADVICE}")
        entries.append(entry)
    if not entries:
        raise CheckpointError(f"{path}: an empty log of gradient statistics{ADVICE}")
    _settings_of(entries[0], path)
    return entries


def _settings_of(header: dict[str, Any], path: Path) -> Gradients:
    try:
        return Gradients(**header["settings"])
    except (TypeError, LlavaPatchError) as error:
        raise CheckpointError(f"{path}, line 1: settings of no gradient statistics ({brief(error)}){ADVICE}") from error


def _counts(entry: dict[str, Any], *names: str) -> bool:
    return all(is_finite(entry[name]) and isinstance(entry[name], int) for name in names)


_NEEDED: dict[str, Callable[[dict[str, Any]], bool]] = {
    "run": lambda entry: isinstance(entry["settings"], dict) and isinstance(entry["facts"], dict),
    "step": lambda entry: _counts(entry, "step"),
    "window": lambda entry: _counts(entry, "first", "last", "count"),
}
"""What an entry of each kind must hold before the rest of it is read."""


def _lines(entries: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(plain(entry), allow_nan=False) + "\n" for entry in entries)
