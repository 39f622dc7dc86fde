"""What a sweep found: mean and spread of each point, the per-seed table; as JSON and as tables."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llava_patch.core import stored
from llava_patch.core.errors import LlavaPatchError
from llava_patch.core.files import write_json, write_text
from llava_patch.core.terminal import markdown
from llava_patch.tools.sweep.plan import Run
from llava_patch.tools.sweep.record import FINAL_STEPS, FinalLoss, OtherRunError, spelled
from llava_patch.tools.sweep.settings import describe, meaning

LOSS = "final loss"
Rows = tuple[list[str], list[list[str]]]


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    run: Run
    loss: FinalLoss | None = None  # final training loss; None when it failed
    metrics: dict[str, float] = field(default_factory=dict)  # of the evaluation, {"task/metric": value}
    error: str | None = None  # why it failed, or None

    def values(self) -> dict[str, float]:
        """Loss and metrics by name; nothing for a run that failed."""
        return {} if self.loss is None else {LOSS: self.loss.mean, **self.metrics}


def with_scores(result: Result, scores: Mapping[str, Sequence[str]]) -> Result:
    """The result with the means that `Sweep.scores` names; one that lacks a metric is left out."""
    means = {
        name: _mean([result.metrics[metric] for metric in metrics])
        for name, metrics in scores.items()
        if set(metrics) <= set(result.metrics)
    }
    return replace(result, metrics={**result.metrics, **means})


def _mean(values: Sequence[float]) -> float:
    """Infinite or not a number where one is."""
    try:
        return statistics.fmean(values)
    except (ValueError, OverflowError):  # both infinities, or too large a sum
        return sum(values) / len(values)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) over seeds; std is None for one seed."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value; one that is not finite (a diverged run) makes both not-a-number."""
        try:
            if all(map(math.isfinite, values)):
                std = statistics.stdev(values) if len(values) > 1 else None
                return cls(statistics.fmean(values), std, len(values))
        except OverflowError:  # near the largest number that there is
            pass
        return cls(math.nan, None if len(values) < 2 else math.nan, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.std is None else f" ± {self.std:.4f}")


def by_point(results: Iterable[Result]) -> list[tuple[dict[str, Any], list[Result]]]:
    """Results grouped by their point of the grid, in order."""
    groups: dict[str, tuple[dict[str, Any], list[Result]]] = {}
    for result in results:
        groups.setdefault(describe(result.run.point), (result.run.point, []))[1].append(result)
    return list(groups.values())


def bindings(results: Iterable[Result]) -> list[str]:
    """Every binding that some point sets, in order; the baseline of a sweep may set others than its grid."""
    return list(dict.fromkeys(key for result in results for key in result.run.point))


def measured(results: Iterable[Result]) -> list[str]:
    """Names of everything that was measured, the loss first."""
    return list(dict.fromkeys(name for result in results for name in result.values()))


def spreads(results: Sequence[Result]) -> dict[str, Spread]:
    """Mean and spread of everything measured in one point's runs; failed runs are left out."""
    values = [result.values() for result in results]
    return {name: Spread.of([one[name] for one in values if name in one]) for name in measured(results)}


def tables(results: Sequence[Result]) -> dict[str, Rows]:
    """The table of means and the per-seed one, by title: one row a measurement of each point, so they stay narrow."""
    keys, seeds = bindings(results), list(dict.fromkeys(result.run.seed for result in results))
    means, single = [], []
    for point, group in by_point(results):
        for name in measured(results):
            line = [*(str(point.get(key, "-")) for key in keys), name]
            spread = spreads(group).get(name)
            means.append([*line, str(spread or "-"), f"{spread.n if spread else 0} of {len(group)}"])
            values = {result.run.seed: result.values().get(name) for result in group}
            single.append([*line, *("-" if values[seed] is None else f"{values[seed]:.4f}" for seed in seeds)])
    return {
        "Mean ± std": ([*keys, "measured", "mean ± std", "seeds"], means),
        "Each seed": ([*keys, "measured", *(f"seed {seed}" for seed in seeds)], single),
    }


def notes(results: Sequence[Result]) -> list[str]:
    """What a reader of the tables must know."""
    lines = [
        f"Final loss: mean training loss (nats per token) of the last {FINAL_STEPS} optimizer steps. "
        "± is the sample standard deviation over seeds."
    ]
    steps = sorted({result.loss.steps for result in results if result.loss is not None})
    if steps and steps[0] < FINAL_STEPS:
        lines.append(f"Some runs have fewer than {FINAL_STEPS} steps: the mean is over {steps[0]} at the least.")
    failed = [result.run.name for result in results if result.error is not None]
    if failed:
        lines.append(f"Failed, and left out of the means: {'; '.join(failed)}.")
    return lines


def write_markdown(path: Path, results: Sequence[Result]) -> Path:
    """Both tables as Markdown."""
    parts = [f"# {title}\n\n{markdown(*table, numbers=True)}" for title, table in tables(results).items()]
    return write_text(path, "\n\n".join([*parts, *notes(results)]) + "\n")


def check_results(path: Path, runs: Sequence[Run]) -> None:
    """Refuse to replace the results of a sweep that had other points (OtherRunError)."""
    try:
        points = stored.read_object(path).get("points")
    except LlavaPatchError:  # none, or not whole: it is made of the runs' own records
        return
    known = [meaning(json.loads(json.dumps(run.point))) for run in runs]
    for one in points if isinstance(points, list) else []:
        point = one.get("point") if isinstance(one, dict) else None
        if isinstance(point, dict) and meaning(point) not in known:
            raise OtherRunError(
                f"{path} holds the results of {describe(point)}, which this sweep has not: give --overwrite to replace "
                "them, or choose another --output"
            )


def write_results(path: Path, results: Sequence[Result], command: Sequence[str], evaluation: str | None) -> Path:
    """Everything as JSON."""

    def written(result: Result) -> dict[str, Any]:
        loss = result.loss and spelled(asdict(result.loss))
        of_run = {"seed": result.run.seed, "folder": str(result.run.folder)}
        return {**of_run, "loss": loss, "metrics": spelled(result.metrics), "error": result.error}

    points = [
        {
            "point": point,
            "baseline": group[0].run.baseline,
            "summary": {name: asdict(spread) for name, spread in spreads(group).items()},
            "runs": list(map(written, group)),
        }
        for point, group in by_point(results)
    ]
    about = {"command": list(command), "evaluate": evaluation, "final_steps": FINAL_STEPS}
    return write_json(path, {**about, "points": points})
