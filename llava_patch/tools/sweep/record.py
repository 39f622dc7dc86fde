"""What a run left, and its own record: with which settings and command it was begun, and what came out.

The record makes a sweep resumable without guessing: a run that is finished is not repeated, one that was interrupted
goes on in its folder, and a folder of another sweep is refused.
"""

import dataclasses
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_patch.core.errors import RunError, SettingError
from llava_patch.core.files import write_json
from llava_patch.measurements.base import decode
from llava_patch.settings import gin_config as config
from llava_patch.settings.checks import is_number
from llava_patch.tools.sweep.plan import Run

EVALUATION = "evaluation"
FILE, EVALUATION_FILE = "llava_patch_sweep.json", "llava_patch_sweep_evaluation.json"
FORMAT = 1
FINAL_STEPS = 50
"""Optimizer steps that the final loss is averaged over (the DPVR paper's number)."""


@dataclass(frozen=True)
class FinalLoss:
    """Mean training loss of a run's last steps."""

    mean: float  # nats per token, as the Trainer logs it
    steps: int  # optimizer steps averaged over; fewer than asked for where the run was shorter
    last_step: int  # the last step that has a logged loss


def trainer_state(folder: Path) -> Path:
    """The trainer_state.json of a training that came to its end: its own, or its last checkpoint's."""
    checkpoints = [p for p in folder.glob("checkpoint-*") if p.name.split("-")[-1].isdigit()]
    latest = sorted(checkpoints, key=lambda p: int(p.name.split("-")[-1]), reverse=True)
    places = (candidate / "trainer_state.json" for candidate in (folder, *latest))
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise RunError(f"{folder}: the command ended well but left no trainer_state.json; does it honour --output_dir?")
    done, steps = (_left(path).get(key) for key in ("global_step", "max_steps"))
    # The Trainer writes its own at the end; a checkpoint is also left by a training that broke off.
    if path.parent != folder and isinstance(steps, int) and isinstance(done, int) and done < steps:
        raise RunError(f"{path}: the command ended well but left a training that broke off at step {done} of {steps}")
    return path


def _left(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: the command ended well but left what cannot be read ({error})") from error
    return found if isinstance(found, dict) else {}


def final_loss(state: Path, window: int = FINAL_STEPS) -> FinalLoss:
    """Mean loss over the last `window` optimizer steps.

    The Trainer logs the mean over the steps since its last entry, so entries are weighted by how many of their steps
    lie in the window; with `--logging_steps 1` that is exact.
    """
    history = _left(state).get("log_history", [])
    entries = sorted((entry["step"], entry["loss"]) for entry in history if "loss" in entry)
    if not entries:
        raise RunError(f"{state}: holds no training loss; is --logging_steps longer than the run?")
    last = entries[-1][0]
    total, steps, previous = 0.0, 0, 0
    for step, loss in entries:
        inside = min(step - previous, max(0, step - (last - window)))
        if inside:
            total += inside * loss
            steps += inside
        previous = step
    return FinalLoss(total / steps, steps, last)


def metrics(folder: Path, known: frozenset[Path] = frozenset()) -> dict[str, float]:
    """Every number of lmms-eval's results in a folder, as {"task/metric": value}, without standard errors."""
    found: dict[str, float] = {}
    files = sorted(set(result_files(folder)) - known)
    for path in files:
        for task, values in _left(path).get("results", {}).items():
            for key, value in values.items():
                metric, _, variant = key.partition(",")
                if "_stderr" not in metric and is_number(value):
                    name = metric if variant in ("", "none") else f"{metric} ({variant})"
                    found[f"{task}/{name}"] = float(value)
    if not found:
        read = f"read {', '.join(map(str, files))}" if files else "no *results.json there"
        raise RunError(f"{folder}: the evaluation command ended well but left no metric ({read})")
    return found


def result_files(folder: Path) -> list[Path]:
    """lmms-eval's aggregated results below a folder."""
    return sorted(folder.rglob("*results.json"))


def begin(run: Run) -> None:
    """Write that a run was begun; an evaluation of what it replaces counts no more."""
    (run.folder / EVALUATION_FILE).unlink(missing_ok=True)
    write_json(run.folder / FILE, {**_identity(run), "state": "begun"})


def finish(run: Run, loss: FinalLoss, seconds: float) -> None:
    """Write a run's outcome."""
    outcome = {"state": "finished", "loss": asdict(loss), "seconds": round(seconds, 1)}
    write_json(run.folder / FILE, {**_identity(run), **outcome})


def finished(run: Run) -> FinalLoss | None:
    """A finished run's loss; None for a run that is still to do, or whose training's state is gone."""
    path = run.folder / FILE
    found = _read(path)
    if found is None:
        strange = [p.name for p in run.folder.iterdir() if not p.name.startswith(".")] if run.folder.is_dir() else []
        if strange:
            raise SettingError(
                f"{run.folder} holds {sorted(strange)[0]} but no {FILE}, so that a run there could go on from another "
                "training's checkpoint: empty the folder, or choose another --output"
            )
        return None
    for key, expected in _identity(run).items():
        if found.get(key) != expected and not (key == "settings" and _resolved(found.get(key)) == _resolved(expected)):
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
    return decode(FinalLoss, found["loss"])


def finish_evaluation(run: Run, command: str | None, metrics: dict[str, float]) -> None:
    """Write an evaluation's metrics."""
    write_json(run.folder / EVALUATION_FILE, {"format": FORMAT, "command": command, "metrics": metrics})


def evaluated(run: Run, command: str | None) -> dict[str, float] | None:
    """A finished evaluation's metrics, {} without a command; None when it is still to do, or its results are gone."""
    path = run.folder / EVALUATION_FILE
    found = {"command": None, "metrics": {}} if command is None else _read(path)
    if found is None:
        return None
    if found["command"] != command:
        raise SettingError(
            f"{path}: made with --evaluate {found['command']!r}, not {command!r}; remove the file to evaluate again"
        )
    there = command is None or result_files(run.folder / EVALUATION)
    return decode(dict[str, float], found["metrics"]) if there else None


def _identity(run: Run) -> dict[str, Any]:
    # Not the folder: a sweep may be moved.
    settings = {"point": json.loads(json.dumps(run.point)), "seed": run.seed, "settings": list(run.settings)}
    return {"format": FORMAT, **settings, "command": list(run.base)}


def _resolved(bindings: Any) -> Any:
    """The settings that a record's bindings stand for: earlier versions wrote them as bound, with every kind's None."""
    if not isinstance(bindings, list) or not all(isinstance(line, str) for line in bindings):
        return bindings
    try:
        return dataclasses.replace(config.read([], ["\n".join(bindings)]), off=())
    except SettingError:
        return bindings


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
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
