"""What a finished run is worth: its final training loss, and the metrics that lmms-eval wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_patch.core.errors import RunError

FINAL_STEPS = 50
"""Optimizer steps that the final loss is averaged over (the DPVR paper's number)."""


@dataclass(frozen=True)
class FinalLoss:
    """Mean training loss of a run's last steps.

    Attributes:
        mean: nats per token, as the Trainer logs it.
        steps: optimizer steps averaged over; fewer than asked for where the run was shorter.
        last_step: the last step that has a logged loss.
    """

    mean: float
    steps: int
    last_step: int


def trainer_state(folder: Path) -> Path:
    """The trainer_state.json of a training that came to its end: its own, or its last checkpoint's.

    Raises:
        RunError: there is none, or the last checkpoint is not the last step's.
    """
    checkpoints = [p for p in folder.glob("checkpoint-*") if p.name.split("-")[-1].isdigit()]
    latest = sorted(checkpoints, key=lambda p: int(p.name.split("-")[-1]), reverse=True)
    for path in (candidate / "trainer_state.json" for candidate in (folder, *latest)):
        if path.is_file():
            done, steps = (_read(path).get(key) for key in ("global_step", "max_steps"))
            # The Trainer writes its own at the end; a checkpoint is also left by a training that broke off.
            if path.parent != folder and isinstance(steps, int) and isinstance(done, int) and done < steps:
                raise RunError(
                    f"{path}: the command ended well but left a training that broke off at step {done} of {steps}"
                )
            return path
    raise RunError(f"{folder}: the command ended well but left no trainer_state.json; does it honour --output_dir?")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: the command ended well but left what cannot be read ({error})") from error
    return found if isinstance(found, dict) else {}


def final_loss(state: Path, window: int = FINAL_STEPS) -> FinalLoss:
    """Mean loss over the last `window` optimizer steps.

    The Trainer logs the mean over the steps since its last entry, so entries are weighted by how many of their steps
    lie in the window; with `--logging_steps 1` that is exact.

    Raises:
        RunError: no loss was logged.
    """
    history = _read(state).get("log_history", [])
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
    """Every number of lmms-eval's results in a folder, as {"task/metric": value}, without standard errors.

    Args:
        folder: what was passed as --output_path.
        known: files of earlier evaluations, not to be read.

    Raises:
        RunError: no results, or results without a number.
    """
    found: dict[str, float] = {}
    files = sorted(set(result_files(folder)) - known)
    for path in files:
        for task, values in _read(path).get("results", {}).items():
            found.update(_numbers(task, values))
    if not found:
        read = f"read {', '.join(map(str, files))}" if files else "no *results.json there"
        raise RunError(f"{folder}: the evaluation command ended well but left no metric ({read})")
    return found


def result_files(folder: Path) -> list[Path]:
    """lmms-eval's aggregated results below a folder."""
    return sorted(folder.rglob("*results.json"))


def _numbers(task: str, values: dict[str, Any]) -> dict[str, float]:
    numbers = {}
    for key, value in values.items():
        metric, _, variant = key.partition(",")
        if "_stderr" in metric or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        name = metric if variant in ("", "none") else f"{metric} ({variant})"
        numbers[f"{task}/{name}"] = float(value)
    return numbers
