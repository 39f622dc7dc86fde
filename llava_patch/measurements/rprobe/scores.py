"""Where a checkpoint's probe figures and benchmark scores are read: R-Probe's JSON and lmms-eval's results JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llava_patch.core.errors import InputError, SettingError
from llava_patch.measurements.rprobe.compare import numbered
from llava_patch.measurements.rprobe.output import RESULT
from llava_patch.measurements.rprobe.result import RProbeResult
from llava_patch.settings.checks import is_number

TASK = "rprobe"
NEVER = math.inf
VACUOUS = "its threshold {0.threshold:g} is vacuous (a constant patch, MSE {0.constant_mse:.3f}, is under it)"
UNTOLD = "lmms-eval's results hold no number of steps where they were never reached or their threshold is vacuous"


@dataclass(frozen=True)
class Score:
    """One number of lmms-eval, which may be nan; `higher_is_better` is None where the JSON does not say."""

    value: float
    higher_is_better: bool | None


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint's numbers: of the probe, of benchmarks by (task, metric), and why one of the probe is `missing`.

    The probe's are those of `correlate.PROBES`; one that is not there was not measured or means nothing, an infinite
    one was never reached.
    """

    name: str
    probe: Mapping[str, float]
    scores: Mapping[tuple[str, str], Score]
    missing: Mapping[str, str] = field(default_factory=dict)


def read_checkpoints(sources: Sequence[str], names: Sequence[str] = ()) -> tuple[list[Checkpoint], list[str]]:
    """Read one checkpoint a source; returns them with notes on what was read from where.

    A source is "RPROBE=RESULTS" (two files, or folders that hold them), a folder that holds both, or lmms-eval's
    results JSON whose `rprobe` task ran with the benchmarks. Without names lmms-eval's name the checkpoints, numbered
    where alike.
    """
    if names and (len(names) != len(sources) or len(set(names)) < len(names)):
        raise SettingError(f"--names: expected {len(sources)} distinct names, got {', '.join(names)}")
    found: list[Checkpoint] = []
    notes: list[str] = []
    for source in sources:
        probe_file, results_file = _files(source, notes)
        try:
            document = json.loads(results_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{results_file}: cannot be read as lmms-eval's results JSON: {error}") from error
        if not isinstance(document, dict):
            raise InputError(f"{results_file}: not lmms-eval's results JSON (no object)")
        scores = read_scores(document, str(results_file))
        if probe_file is None:
            # Steps that were never reached are not in the figures of lmms-eval's `rprobe` task.
            given = {
                key: scores.get((TASK, f"{TASK}_{key}")) for key in ("mse", "fvu", "psnr", "steps", "steps_half_fvu")
            }
            probe = {key: one.value for key, one in given.items() if one is not None and math.isfinite(one.value)}
            if "mse" not in probe:
                raise InputError(
                    f"{results_file}: holds no {TASK} task: run it with the benchmarks, or give RPROBE=RESULTS"
                )
            missing = {key: UNTOLD for key in ("steps", "steps_half_fvu") if key not in probe}
        else:
            result = RProbeResult.load(probe_file)
            probe = probe_figures(result)
            missing = {"steps": VACUOUS.format(result)} if result.threshold_is_vacuous else {}
        model = str(document.get("model_name") or "").rstrip("/").split("/")[-1]
        found.append(Checkpoint(model or results_file.resolve().parent.name, probe, scores, missing))
    labels = names or numbered([one.name for one in found])
    return [replace(one, name=label) for label, one in zip(labels, found, strict=True)], notes


def probe_figures(result: RProbeResult) -> dict[str, float]:
    """The figures of `correlate.PROBES`; steps to a vacuous threshold are missing, steps never reached infinite."""
    steps = {"steps_half_fvu": result.steps_to_half_fvu}
    if not result.threshold_is_vacuous:
        steps["steps"] = result.steps_to_threshold
    reached = {key: NEVER if step is None else float(step) for key, step in steps.items()}
    return {"mse": result.mse, "fvu": result.fvu, "psnr": result.psnr, **reached}


def read_scores(document: Any, name: str) -> dict[tuple[str, str], Score]:
    """The numbers of lmms-eval's results JSON, by (task, metric); a filter other than "none" stays part of the metric.

    "results" maps tasks to "metric,filter", "metric_stderr,filter" and "alias".
    """
    results = document.get("results") if isinstance(document, dict) else None
    if not isinstance(results, dict) or not all(isinstance(values, dict) for values in results.values()):
        raise InputError(f'{name}: not lmms-eval\'s results JSON (it has no tasks under "results")')
    directions = document.get("higher_is_better") or {}
    found = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            # lmms-eval writes metric_stderr and kinds of it; counts and texts are no scores.
            if not kind or "_stderr" in metric or not is_number(value):
                continue
            direction = (directions.get(task) or {}).get(metric)
            better = direction if isinstance(direction, bool) else None
            found[task, metric if kind == "none" else f"{metric},{kind}"] = Score(float(value), better)
    return found


def _files(source: str, notes: list[str]) -> tuple[Path | None, Path]:
    """(R-Probe's result or None, lmms-eval's results) of one source."""
    path = Path(source)
    if path.exists():
        return (_probe_file(path, required=False), _results_file(path, notes)) if path.is_dir() else (None, path)
    # A path may hold "=" itself: take the split at which both parts are there.
    parts = source.split("=")
    for i in range(1, len(parts)):
        left, right = Path("=".join(parts[:i])), Path("=".join(parts[i:]))
        if left.exists() and right.exists():
            return _probe_file(left, required=True), _results_file(right, notes)
    raise InputError(
        f"{source}: no such file or folder; expected RPROBE=RESULTS, a folder, or lmms-eval's results JSON"
    )


def _probe_file(path: Path, required: bool) -> Path | None:
    if path.is_file():
        return path
    below = [path / RESULT] if (path / RESULT).is_file() else sorted(path.rglob(RESULT))
    # lmms-eval's group of the ablation leaves four beside one another.
    named = [file for file in below if file.parent.name == TASK] or below
    if len(named) > 1:
        raise InputError(f"{path}: holds several results ({', '.join(map(str, named))}): give one as RPROBE=RESULTS")
    if not named and required:
        raise InputError(f"{path}: holds no {RESULT}")
    return named[0] if named else None


def _results_file(path: Path, notes: list[str]) -> Path:
    if path.is_file():
        return path
    found = sorted(path.rglob("*results.json"), key=lambda file: (file.name, str(file)))
    if not found:
        raise InputError(f"{path}: holds no results JSON of lmms-eval (*results.json)")
    if len(found) > 1:
        # lmms-eval puts the date first, so the last name is the newest run.
        notes.append(f"{path} holds {len(found)} results: the newest, {found[-1].name}, is taken")
    return found[-1]
