"""What a run left, and its own record: with which settings and command it was begun, and what came out.

The record makes a sweep resumable without guessing: a run that is finished is not repeated, one that was interrupted
goes on in its folder, and a folder of another sweep is refused.
"""

import ast
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_patch.core import stored
from llava_patch.core.errors import RunError, SettingError, shown
from llava_patch.core.files import storage_errors, write_json
from llava_patch.measurements.base import decode
from llava_patch.settings import gin_config as config
from llava_patch.tools.sweep.plan import Run
from llava_patch.tools.sweep.settings import meaning

EVALUATION = "evaluation"
FILE, EVALUATION_FILE = "llava_patch_sweep.json", "llava_patch_sweep_evaluation.json"
FORMAT = 1
FINAL_STEPS = 50
"""Optimizer steps that the final loss is averaged over (the DPVR paper's number)."""


_LEFT = ": the command ended well, but this is what it left; see its log"


class OtherRunError(SettingError):
    """A folder holds a run of a sweep that is not this one, or whose record is damaged; --overwrite replaces it."""


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
    state = stored.read_object(path, RunError, _LEFT)
    done, steps = (state.get(key) for key in ("global_step", "max_steps"))
    # The Trainer writes its own at the end; a checkpoint is also left by a training that broke off.
    if path.parent != folder and isinstance(steps, int) and isinstance(done, int) and done < steps:
        raise RunError(f"{path}: the command ended well but left a training that broke off at step {done} of {steps}")
    return path


def final_loss(state: Path, window: int = FINAL_STEPS) -> FinalLoss:
    """Mean loss over the last `window` optimizer steps.

    The Trainer logs the mean over the steps since its last entry, so entries are weighted by how many of their steps
    lie in the window; with `--logging_steps 1` that is exact.
    """
    history = stored.read_object(state, RunError, _LEFT).get("log_history", [])
    entries = _entries(history, state)
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


def _entries(history: Any, path: Path) -> list[tuple[int, float]]:
    """Steps with their logged losses, which may be infinite or not a number."""
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise RunError(f"{path}: log_history: expected a list of objects{_LEFT}")
    found: dict[int, float] = {}
    for entry in history:
        if "loss" in entry:
            found[stored.field(entry, "step", int, path, RunError)] = _number(entry["loss"], f"{path}: loss")
    return sorted(found.items())


def _number(value: Any, where: str) -> float:
    """A number that another program wrote, infinite or not a number as it may be; RunError: it is none."""
    try:
        if stored.is_a_number(value):
            return float(value)
    except OverflowError:  # an integer of hundreds of digits
        pass
    raise RunError(f"{where} = {shown(value)}: expected a number{_LEFT}")


def metrics(folder: Path, known: frozenset[Path] = frozenset()) -> dict[str, float]:
    """Every number of lmms-eval's results in a folder, as {"task/metric": value}, without standard errors."""
    found: dict[str, float] = {}
    files = sorted(set(result_files(folder)) - known)
    for path in files:
        tasks = stored.read_object(path, RunError, _LEFT).get("results", {})
        if not isinstance(tasks, dict) or not all(isinstance(values, dict) for values in tasks.values()):
            raise RunError(f"{path}: results: expected an object for each task{_LEFT}")
        for task, values in tasks.items():
            for key, value in values.items():
                metric, _, variant = key.partition(",")
                if "_stderr" not in metric and stored.is_a_number(value):
                    name = metric if variant in ("", "none") else f"{metric} ({variant})"
                    found[f"{task}/{name}"] = _number(value, f"{path}: {task}/{key}")
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
    outcome = {"state": "finished", "loss": spelled(asdict(loss)), "seconds": round(seconds, 1)}
    write_json(run.folder / FILE, {**_identity(run), **outcome})


def clear(run: Run) -> None:
    """Take away what a run left, but for its record: where this is broken off, that still says whose the rest is."""
    with storage_errors(run.folder / FILE):
        for path in run.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in (FILE, ".lock"):
                path.unlink()


def finished(run: Run) -> FinalLoss | None:
    """A finished run's loss; None for a run that is still to do, or whose training's state is gone.

    OtherRunError: the folder holds a run with other settings, or a damaged record; SettingError: none of a sweep.
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
    again = f": give --overwrite to train it again, remove {run.folder}, or choose another --output"
    found = _read(path, again)
    for key, expected in _identity(run).items():
        difference = _difference(key, found.get(key), expected)
        if difference:
            raise OtherRunError(f"{path}: made with {difference}; use what it was made with{again}")
    if found.get("state") != "finished":
        return None
    try:
        trainer_state(run.folder)
    except RunError:
        return None
    try:
        loss = found["loss"]
        return dataclasses.replace(decode(FinalLoss, {**loss, "mean": 0.0}), mean=_read_back(loss["mean"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OtherRunError(f"{path}: loss is not one that a sweep wrote ({error}){again}") from error


def finish_evaluation(run: Run, command: str | None, metrics: dict[str, float]) -> None:
    """Write an evaluation's metrics."""
    write_json(run.folder / EVALUATION_FILE, {"format": FORMAT, "command": command, "metrics": spelled(metrics)})


def evaluated(run: Run, command: str | None) -> dict[str, float] | None:
    """A finished evaluation's metrics, {} without a command; None when it is still to do, or its results are gone.

    OtherRunError: the folder holds another evaluation, or a damaged record of one.
    """
    path = run.folder / EVALUATION_FILE
    if command is None:
        return {}
    if not path.is_file():
        return None
    again = ": remove the file, or give --overwrite, to evaluate again"
    found = _read(path, again)
    if found.get("command") != command:
        raise OtherRunError(f"{path}: made with --evaluate {found.get('command')!r}, not {command!r}{again}")
    try:
        written = {name: _read_back(value) for name, value in found["metrics"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OtherRunError(f"{path}: metrics are not those that a sweep wrote ({error}){again}") from error
    return written if result_files(run.folder / EVALUATION) else None


_SPELLED = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def spelled(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers that JSON does not have as words."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _read_back(value: Any) -> float:
    """The number that `spelled` wrote, infinite or not a number as it may be; TypeError: it is none."""
    if isinstance(value, str) and value in _SPELLED:
        return _SPELLED[value]
    if not stored.is_finite(value):
        raise TypeError(f"expected a number, got {shown(value)}")
    return float(value)


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


def _read(path: Path, again: str) -> dict[str, Any]:
    found = stored.read_object(path, OtherRunError, again)
    if found.get("format") != FORMAT:
        raise OtherRunError(f"{path}: not a record of this version of llava_patch{again}")
    return found


def _difference(key: str, found: Any, expected: Any) -> str:
    """In what a part of two runs' identities differs, in words; "" where both mean the same."""
    if key == "settings" and stored.strings(found):
        there, now = bindings(found), bindings(expected)
        names = [n for n in {**there, **now} if (n in there) != (n in now) or there.get(n) != now.get(n)]
        if not names or _resolved(found) == _resolved(expected):
            return ""
        return f"other settings: {_lines(found, names)} there, {_lines(expected, names)} now"
    if meaning(found) == meaning(expected):
        return ""
    if not isinstance(found, list) or not isinstance(expected, list):
        return f"another {key}: {shown(found)} there, {shown(expected)} now"
    words = [" ".join(str(item) for item in one if item not in other) for one, other in
             ((found, expected), (expected, found))]  # fmt: skip
    if not any(words):
        return "another command: the same words in another order"
    return f"another command: {words[0][:200] or 'nothing'} there, {words[1][:200] or 'nothing'} now"


def bindings(lines: Sequence[str]) -> dict[str, Any]:
    """What lines of an operative config bind, by name and by meaning; a long value goes on in lines that are set in."""
    text = re.sub(r"\s*\\?\n\s+", " ", "\n".join(lines))
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(" = ")
        try:
            found[name] = meaning(ast.literal_eval(value.strip()))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found[name] = value  # a reference
    return found


def _lines(lines: Sequence[str], names: Sequence[str]) -> str:
    """The first lines that bind these."""
    return " ".join([line for line in lines if line.partition(" = ")[0] in names][:3]) or "nothing"
