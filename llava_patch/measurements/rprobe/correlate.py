"""Rank correlation of several checkpoints' probe results with their benchmark scores.

Source: "Detached Skip-Links and R-Probe", table 8: within one backbone, a lower probe loss goes with a higher OCR
score. Everything is turned so that more is better, the probe's error and steps as well as a score whose lower values
are better: a correlation above 0 says that a better probe goes with a better score.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llava_patch.core.errors import InputError, SettingError
from llava_patch.core.extras import optional
from llava_patch.measurements.rprobe.figures import COLOURS, plain_name
from llava_patch.measurements.rprobe.scores import Checkpoint

PROBES = {
    "mse": ("held-out MSE (normalised pixel values²)", False),
    "fvu": ("held-out FVU", False),
    "steps": ("steps to the MSE threshold", False),
    "steps_half_fvu": ("steps to FVU < 0.5", False),
    "psnr": ("held-out PSNR (dB)", True),
}
"""Name of each probe figure: what it is, and whether more is better."""
MARKERS = "os^Dv*P"
FEW = 5
RESAMPLES = 9999
EXACT = 7  # checkpoints up to which all permutations (5040) are fewer than that


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


def figure(found: Sequence[Correlation], probe: str) -> Any:
    """A small panel a benchmark; a legend names the points, because names beside them would cover one another."""
    names = list(dict.fromkeys(name for one in found for name, _, _ in one.points))
    # Colours come round again with another marker.
    styles = {
        name: {"marker": marker, "color": color, "markersize": 4.5, "linestyle": "none"}
        for name, (marker, color) in zip(names, itertools.cycle(itertools.product(MARKERS, COLOURS)), strict=False)
    }
    columns = min(3, len(found))
    rows = math.ceil(len(found) / columns)
    size = max(4.0, 2.5 * columns), 2.4 * rows + 0.4 + 0.17 * math.ceil(len(names) / 2)
    picture = optional("matplotlib.figure").Figure(figsize=size, layout="constrained")
    axes = picture.subplots(rows, columns, squeeze=False).reshape(-1)
    for axis in axes[len(found) :]:
        axis.remove()
    for axis, one in zip(axes, found, strict=False):
        _panel(axis, one, styles)
        axis.set_xlabel(PROBES[probe][0], fontsize=7)
    points = [axes[0].plot([], [], **style)[0] for style in styles.values()]
    shown = [plain_name(name, 44) for name in names]
    picture.legend(points, shown, loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    return picture


def _panel(axis: Any, one: Correlation, styles: Mapping[str, Any]) -> None:
    finite = [value for _, value, _ in one.points if math.isfinite(value)]
    # What was never reached stands past the largest value.
    never = 1.15 * max(finite, default=1.0)
    for name, value, score in one.points:
        axis.plot(value if math.isfinite(value) else never, score, **styles[name])
    rho = "no rank" if one.spearman is None else f"$\\rho$ = {one.spearman:+.2f}, n = {one.n}"
    axis.set_title(one.task.replace("$", r"\$") + f"\n{rho}", fontsize=8)
    better = {True: "(higher is better)", False: "(lower is better)", None: ""}[one.higher_is_better]
    axis.set_ylabel(f"{one.metric}\n{better}".rstrip(), fontsize=7, parse_math=False)
    axis.tick_params(labelsize=6.5)
    axis.locator_params(axis="x", nbins=5)
    axis.margins(0.15, 0.15)
    axis.grid(alpha=0.25, linewidth=0.5)
    if len(finite) < len(one.points):
        axis.axvline(never, color="0.6", linewidth=0.7, linestyle=":")
        axis.text(never, 1.0, "never", fontsize=6, ha="right", va="top", transform=axis.get_xaxis_transform())
