"""A run's own record: with which settings and command it was begun, and what came out.

It makes a sweep resumable without guessing: a run that is finished is not repeated, one that was interrupted goes on
in its folder, and a folder of another sweep is refused.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_patch.core.errors import RunError, SettingError
from llava_patch.core.files import write_json
from llava_patch.tools.sweep.outcome import FinalLoss, result_files, trainer_state
from llava_patch.tools.sweep.plan import Run

EVALUATION = "evaluation"
FILE, EVALUATION_FILE = "llava_patch_sweep.json", "llava_patch_sweep_evaluation.json"
FORMAT = 1


def begin(run: Run) -> None:
    """Write that a run was begun; an evaluation of what it replaces counts no more."""
    (run.folder / EVALUATION_FILE).unlink(missing_ok=True)
    write_json(run.folder / FILE, {**_identity(run), "state": "begun"})


def finish(run: Run, loss: FinalLoss, seconds: float) -> None:
    """Write a run's outcome."""
    outcome = {"state": "finished", "loss": asdict(loss), "seconds": round(seconds, 1)}
    write_json(run.folder / FILE, {**_identity(run), **outcome})


def finished(run: Run) -> FinalLoss | None:
    """A finished run's loss; None for a run that is still to do, or whose training's state is gone.

    Raises:
        SettingError: the folder holds a run of other settings or of another command, or files of unknown origin.
    """
    path = run.folder / FILE
    if not path.is_file():
        strange = [p.name for p in run.folder.iterdir() if not p.name.startswith(".")] if run.folder.is_dir() else []
        if strange:
            raise SettingError(
                f"{run.folder} holds {sorted(strange)[0]} but no {FILE}, so that a run there could go on from another "
                "training's checkpoint: empty the folder, or choose another --output"
            )
        return None
    found = _read(path)
    for key, expected in _identity(run).items():
        if found.get(key) != expected:
            raise SettingError(
                f"{path}: made with {_difference(key, found.get(key), expected)}; use what it was made with, remove "
                f"{run.folder}, or choose another --output"
            )
    if found["state"] != "finished":
        return None
    try:
        trainer_state(run.folder)
    except RunError:
        return None
    loss = found["loss"]
    return FinalLoss(float("nan") if loss["mean"] is None else loss["mean"], loss["steps"], loss["last_step"])


def finish_evaluation(run: Run, command: str, metrics: dict[str, float]) -> None:
    """Write an evaluation's metrics."""
    write_json(run.folder / EVALUATION_FILE, {"format": FORMAT, "command": command, "metrics": metrics})


def evaluated(run: Run, command: str) -> dict[str, float] | None:
    """A finished evaluation's metrics; None when it is still to do, or its results are gone.

    Raises:
        SettingError: it was made with another command.
    """
    path = run.folder / EVALUATION_FILE
    if not path.is_file():
        return None
    found = _read(path)
    if found["command"] != command:
        raise SettingError(
            f"{path}: made with --evaluate {found['command']!r}, not {command!r}; remove the file to evaluate again"
        )
    if not result_files(run.folder / EVALUATION):
        return None
    return {key: float("nan") if value is None else value for key, value in found["metrics"].items()}


def _identity(run: Run) -> dict[str, Any]:
    # Not the folder: a sweep may be moved.
    settings = {"point": json.loads(json.dumps(run.point)), "seed": run.seed, "settings": list(run.settings)}
    return {"format": FORMAT, **settings, "command": list(run.base)}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingError(f"{path}: not JSON ({error}); remove the run's folder") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise SettingError(f"{path}: not a record of this version of llava_patch; choose another --output")
    return found


def _difference(key: str, found: Any, expected: Any) -> str:
    if not isinstance(found, list) or not isinstance(expected, list):
        return f"another {key}: {found!r} there, {expected!r} now"
    there = [str(item) for item in found if item not in expected]
    now = [str(item) for item in expected if item not in found]
    what = "another command" if key == "command" else "other settings"
    if not there and not now:
        return f"{what}: the same words in another order"
    return f"{what}: {' '.join(there[:3]) or 'nothing'} there, {' '.join(now[:3]) or 'nothing'} now"
