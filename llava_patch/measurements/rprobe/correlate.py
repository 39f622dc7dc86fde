"""Rank correlation of several checkpoints' probe results with their benchmark scores.

Source: "Detached Skip-Links and R-Probe", table 8: within one backbone, a lower probe loss goes with a higher OCR
score. The probe's figures come from R-Probe's JSON, the scores from lmms-eval's results JSON. Everything is turned so
that more is better, the error and steps as well as a score whose lower values are better: a correlation above 0 says
that a better probe goes with a better score.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_patch.core.errors import InputError, SettingError
from llava_patch.core.extras import optional
from llava_patch.core.stored import is_a_number, is_finite, read_object
from llava_patch.measurements.rprobe.compare import numbered
from llava_patch.measurements.rprobe.output import RESULT
from llava_patch.measurements.rprobe.result import RProbeResult

PROBES = {
    "mse": ("held-out MSE (normalised pixel values²)", False),
    "fvu": ("held-out FVU", False),
    "steps": ("steps to the MSE threshold", False),
    "steps_half_fvu": ("steps to FVU < 0.5", False),
    "psnr": ("held-out PSNR (dB)", True),
}
"""Name of each probe figure: what it is, and whether more is better."""
FEW = 5
RESAMPLES = 9999
EXACT = 7  # checkpoints up to which all permutations (5040) are fewer than that


TASK = "rprobe"
_ADVICE = ": give the *results.json that lmms-eval wrote, or its folder"
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


@dataclass(frozen=True)
class Correlation:
    """How one benchmark figure goes with the probe's over checkpoints.

    `spearman` and `kendall` (tau-b, which allows for ties) are -1..1; `p` is Spearman's two-sided p-value under
    permutation of the scores; all are None without a rank (n < 2, or all values equal). `higher_is_better` is None
    where it is not recorded, and taken as True. `points` are (checkpoint, probe figure, score) as measured, a figure
    that was never reached infinite; `notes` say what was left out or does not count.
    """

    task: str
    metric: str
    n: int
    spearman: float | None
    kendall: float | None
    p: float | None
    higher_is_better: bool | None
    points: list[tuple[str, float, float]]
    notes: list[str] = field(default_factory=list)


def correlate(
    checkpoints: Sequence[Checkpoint], probe: str = "mse", tasks: Sequence[str] = (), seed: int = 0
) -> tuple[list[Correlation], list[str]]:
    """Correlate one probe figure (a key of `PROBES`) with the benchmark scores of at least two checkpoints.

    Tasks are named, or "task/metric"; none: every metric with a direction that all checkpoints have. Returns
    (correlations, notes that concern all of them).
    """
    if probe not in PROBES:
        raise SettingError(f"--probe {probe}: expected one of {', '.join(PROBES)}")
    if len(checkpoints) < 2:
        raise InputError(f"a correlation needs at least two checkpoints, got {len(checkpoints)}")
    notes: list[str] = []
    keys = _wanted(checkpoints, tasks) if tasks else _shared(checkpoints, notes)
    if not keys:
        raise InputError(
            "the checkpoints share no benchmark score that says whether more is better; name some with --tasks"
        )
    values = {}
    for checkpoint in checkpoints:
        value = checkpoint.probe.get(probe)
        if value is None or math.isnan(value):
            why = checkpoint.missing.get(probe, "its results do not hold it")
            notes.append(f"{checkpoint.name} has no {PROBES[probe][0]} and is left out: {why}")
        else:
            values[checkpoint.name] = value
            if math.isinf(value):
                notes.append(f"{checkpoint.name} never reached it ({PROBES[probe][0]}): ranked last")
    found = [_one(key, checkpoints, values, probe, seed) for key in keys]
    if all(one.n < 2 for one in found):
        most = max(one.n for one in found)
        raise InputError(
            f"nothing to correlate: {most} of {len(checkpoints)} checkpoints have both {PROBES[probe][0]} and a score: "
            f"{'; '.join([*notes, *footer(found)])}"
        )
    if len(values) < FEW:
        notes.append(
            f"n = {len(values)}: fewer than {FEW} checkpoints prove nothing, whatever the correlation; "
            f"with {FEW - 1} even a perfect one arises by chance in 1 of 12 cases"
        )
    return found, notes


def _shared(checkpoints: Sequence[Checkpoint], notes: list[str]) -> list[tuple[str, str]]:
    """Metrics that every checkpoint has a number of and whose direction is known, the probe's own left out."""
    first, *others = ([k for k in checkpoint.scores if not k[0].startswith("rprobe")] for checkpoint in checkpoints)
    common = [
        key for key in first if all(key in one.scores and math.isfinite(one.scores[key].value) for one in checkpoints)
    ]
    kept = [key for key in common if _direction(key, checkpoints) is not None]
    blind = [key for key in common if key not in kept]
    for left_out, why in (
        (blind, "they do not say whether more is better"),
        (sorted({*first}.union(*others) - {*common}), "not every checkpoint has them"),
    ):
        if left_out:
            notes.append(f"left out, because {why}: {', '.join('/'.join(key) for key in left_out)}")
    return kept


def _wanted(checkpoints: Sequence[Checkpoint], tasks: Sequence[str]) -> list[tuple[str, str]]:
    known = list(dict.fromkeys(key for checkpoint in checkpoints for key in checkpoint.scores))
    found: dict[tuple[str, str], None] = {}
    for wanted in tasks:
        task, _, metric = wanted.partition("/")
        match = [key for key in known if key[0] == task and metric in ("", key[1])]
        if not match:
            metrics = ", ".join(key[1] for key in known if key[0] == task)
            there = f"metrics of {task}: {metrics}"
            if not metrics:
                there = f"tasks: {', '.join(sorted({key[0] for key in known})) or 'none'}"
            raise SettingError(f"--tasks {wanted}: no checkpoint has it; {there}")
        found |= dict.fromkeys(match)
    return list(found)


def _direction(key: tuple[str, str], checkpoints: Sequence[Checkpoint]) -> bool | None:
    """Whether more is better; the checkpoints that record it must agree."""
    said = {one.scores[key].higher_is_better for one in checkpoints if key in one.scores} - {None}
    if len(said) > 1:
        raise InputError(f"{key[0]}/{key[1]}: the results disagree on whether more is better")
    return next(iter(said), None)


def _one(
    key: tuple[str, str], checkpoints: Sequence[Checkpoint], values: Mapping[str, float], probe: str, seed: int
) -> Correlation:
    points, notes = [], []
    for name, scores in ((one.name, one.scores) for one in checkpoints if one.name in values):
        if key in scores and math.isfinite(scores[key].value):
            points.append((name, values[name], scores[key].value))
        else:
            notes.append(f"{name} has no {'/'.join(key)}")
    higher = _direction(key, checkpoints)
    if higher is None:
        notes.append("does not say whether more is better: taken as if it were")
    x = np.array([p[1] for p in points]) * (1 if PROBES[probe][1] else -1)
    y = np.array([p[2] for p in points]) * (-1 if higher is False else 1)
    different = {"probe figures": len({*x.tolist()}), "scores": len({*y.tolist()})}
    constant = [what for what, count in different.items() if count == 1]
    ties = [what for what, count in different.items() if count < len(points)]
    found: tuple[float | None, float | None, float | None] = None, None, None
    if len(points) < 2:
        notes.append("fewer than two checkpoints have it")
    elif constant:
        notes.append(f"all {' and '.join(constant)} are equal: no rank")
    else:
        found = ranks(x, y, seed)
        if ties:
            notes.append(f"ties among {' and '.join(ties)} take their mean rank")
    return Correlation(*key, len(points), *found, higher, points, notes)


def ranks(x: np.ndarray, y: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """(Spearman, Kendall's tau-b, two-sided permutation p-value of Spearman) of two lists; infinities are ranked.

    Every order of the scores is counted up to 7 values (then a tie with the found value counts as at least as extreme);
    above, 9999 orders are drawn.
    """
    stats = optional("scipy.stats")
    a, b = stats.rankdata(x), stats.rankdata(y)
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float((a**2).sum() * (b**2).sum()))
    test = stats.permutation_test(
        (a,),
        lambda order, axis: (order * b).sum(axis) / norm,
        permutation_type="pairings",
        n_resamples=math.inf if len(x) <= EXACT else RESAMPLES,
        vectorized=True,
        alternative="two-sided",
        random_state=np.random.default_rng(seed),
    )
    return float(stats.spearmanr(a, b).statistic), float(stats.kendalltau(a, b).statistic), min(1.0, float(test.pvalue))


def cells(found: Sequence[Correlation]) -> tuple[list[str], list[list[str]]]:
    """(head, lines) of the table as text."""
    lines = []
    for one in found:
        numbers = ((one.spearman, "+.3f"), (one.kendall, "+.3f"), (one.p, ".4f"))
        shown = ["-" if value is None else f"{value:{form}}" for value, form in numbers]
        lines.append([one.task, one.metric, str(one.n), *shown])
    return ["benchmark", "metric", "n", "Spearman", "Kendall", "p (permutation)"], lines


def footer(found: Sequence[Correlation]) -> list[str]:
    """What was said of single benchmarks, alike notes together."""
    said: dict[str, list[str]] = {}
    for one in found:
        for note in one.notes:
            said.setdefault(note, []).append(f"{one.task}/{one.metric}")
    return [f"{', '.join(names)}: {note}" for note, names in said.items()]


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
        document = read_object(results_file, InputError, _ADVICE)
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
        model = document.get("model_name")
        model = model.rstrip("/").split("/")[-1] if isinstance(model, str) else ""
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
        raise InputError(f'{name}: not lmms-eval\'s results JSON (it has no tasks under "results"){_ADVICE}')
    directions = document.get("higher_is_better")
    directions = directions if isinstance(directions, dict) else {}
    found = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            # lmms-eval writes metric_stderr and kinds of it; counts and texts are no scores.
            if not kind or "_stderr" in metric or not is_a_number(value) or (value == value and not is_finite(value)):
                continue
            own = directions.get(task)
            direction = own.get(metric) if isinstance(own, dict) else None
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
