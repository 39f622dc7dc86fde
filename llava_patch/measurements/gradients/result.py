"""What the gradient statistics of one run came to, and several runs side by side: Table 3 of the Skip-Links paper."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from llava_patch.core.errors import CheckpointError, InputError
from llava_patch.core.files import plain
from llava_patch.measurements.base import DAMAGED, Result, decode, decode_fields, encode
from llava_patch.measurements.gradients.log import ADVICE, LOG, read_lines
from llava_patch.measurements.gradients.measurement import Gradients, name_of
from llava_patch.measurements.gradients.moments import PATHS, Moments, Step
from llava_patch.measurements.gradients.statistics import transition_step

NAME = "gradients"
WHOLE = f"{NAME}.json"
PLACES = ("", "gradients", "seed*/gradients", "*/seed*/gradients")
"""Where a run's results lie: in its folder, a training run's, a sweep's point or a whole sweep."""
CURVED = {
    "curvature": "curvature along the full gradient, L",
    "main_curvature": "curvature along the main gradient",
    "stretch": "||g_full|| / ||g_main||",
}
GAINS = {
    "detach_gain": "gain of detaching, by the condition",
    "detach_gain_own": "gain of detaching, own curvatures",
    "same_length_gain": "gain at the full one's length",
}
"""Rows of what the curvature predicts for one plain step."""
SMALL_C = 0.01
"""Below this c, a correlation of 0.005 between the paths' noise already makes delta 0.1, the paper's bound."""


@dataclass(frozen=True)
class GradientsResult(Result):
    """Measured steps and the windows over them.

    Its facts: learning_rate, block, fusion, batch, checkpoint, trains (False: one fixed checkpoint).
    """

    NAME, TITLE = NAME, "gradients"
    FIGURE = "llava_patch.measurements.gradients.figure:gradients_figure"

    steps: list[Step]  # every measured step, in order
    windows: list[Moments]  # the complete windows of `settings.window` steps
    settings: Gradients = field(default_factory=Gradients)

    @cached_property
    def transition(self) -> int | None:
        """t_trans in training steps, or None; see `transition_step`."""
        if not self.trains:
            return None
        return transition_step(self.steps, self.settings.window, self.settings.transition_windows)

    @property
    def transition_takes(self) -> int:
        """How many measured steps t_trans takes at least."""
        return self.settings.window * self.settings.transition_windows

    @property
    def too_short(self) -> bool:
        """Whether fewer steps were measured, so that no t_trans says nothing."""
        return sum(not math.isnan(s.ratio) for s in self.steps) < self.transition_takes

    @property
    def trains(self) -> bool:
        """Whether the weights moved from step to step."""
        return bool(self.facts.get("trains", True))

    @property
    def median_cosine(self) -> float:
        """Over the measured steps; NaN when no step has one."""
        return _median(s.cosine for s in self.steps)

    @property
    def median_delta(self) -> float:
        """Over the complete windows; NaN without one."""
        return self.typical("delta")

    def typical(self, name: str) -> float:
        """Median of one of the windows' values, by its name in `Moments`; NaN without a complete window."""
        return _median(getattr(w, name) for w in self.windows)

    def conditions(self) -> list[bool | None]:
        """Whether condition (7) holds in each window; None where L, gamma or a second step is missing."""
        settings = self.settings
        return [w.to_dict(settings.smoothness, settings.step_size)["condition"] for w in self.windows]

    def encode(self) -> dict[str, Any]:
        """Steps and windows with what follows from their moments."""
        settings = self.settings
        return {
            "facts": self.facts,
            "settings": encode(settings),
            "transition_step": self.transition,
            "median_cosine": self.median_cosine,
            "median_delta": self.median_delta,
            "windows": [w.to_dict(settings.smoothness, settings.step_size) for w in self.windows],
            "steps": [s.to_dict() for s in self.steps],
        }

    @classmethod
    def decode(cls, values: dict[str, Any]) -> "GradientsResult":
        """Read the moments; what follows from them is worked out again."""
        steps = [decode_fields(Step, step, others=True) for step in values["steps"]]
        windows = [decode_fields(Moments, window, others=True) for window in values["windows"]]
        return cls(steps, windows, decode(Gradients, values["settings"]), facts=dict(values["facts"]))

    @classmethod
    def read(cls, folder: str | Path) -> "GradientsResult":
        """Read a run's folder, also while it trains: its log, or without one its gradients.json.

        Raises:
            CheckpointError: neither is there, or it is damaged.
        """
        log, whole = Path(folder) / LOG, Path(folder) / WHOLE
        if not log.exists() and not whole.exists():
            raise CheckpointError(
                f"{folder}: neither {LOG} nor {WHOLE} there: give the output folder of a run that was measured "
                "(a Gradients binding in its gin configuration)"
            )
        try:
            if not log.exists():
                return cls.load(whole)
            first, *rest = read_lines(log)
            parts = {f"{kind}s": [entry for entry in rest if entry["kind"] == kind] for kind in ("step", "window")}
            found = cls.decode({**first, **parts})
            found.check()
            return found
        except InputError as error:
            raise CheckpointError(str(error)) from error
        except DAMAGED as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{log}: damaged gradient statistics ({error!r}){ADVICE}") from error

    def finding(self) -> str:
        """Whether to detach the taps, as far as the data say."""
        measured = [s for s in self.steps if s.finite]
        if not measured:
            return "Undecided: nothing with finite gradients was measured."
        if all(s.skip == 0 for s in measured):
            return "Nothing passes the skip taps yet: train the projector first, then measure again."
        if self.trains and self.transition is not None:
            return f"The main path leads from step {self.transition} on: the skip gradient stays the shorter one."
        if self.trains:
            short = "Undecided: too few steps to tell whether the skip gradient settles below the main one."
            return short if self.too_short else "The skip gradient never settled below the main one: try detached taps."
        if known := [c for c in self.conditions() if c is not None]:
            if len(set(known)) > 1:
                return "Undecided: the detaching condition holds in some windows and not in others."
            return (
                "Detach the taps: a step without the skip gradient is no worse, by the detaching condition."
                if known[0]
                else "Leave the taps attached: by the detaching condition a step without the skip gradient is worse."
            )
        low, high = median_interval([s.cosine for s in measured])
        if math.isinf(low):
            return f"Undecided: {len(measured)} batches are too few for an interval; give more samples."
        if high < 0:
            return "The skip gradient pulls against the main one: detached taps spare the block that conflict."
        if low > 0:
            return "The skip gradient pulls the main one's way: detaching the taps would give it up."
        return "Undecided: the skip gradient has no direction of its own against the main one (cosine around 0)."

    def caution(self) -> str:
        """For what the finding holds."""
        if not any(s.finite for s in self.steps):
            return ""
        where = "this run" if self.trains else "these weights"
        text = f"It holds for {where} and one block."
        if not self.trains and not any(c is not None for c in self.conditions()):
            text += " Whether a detached step is better depends on the curvature too (Gradients.curvature)."
        return text

    def summary(self) -> str:
        """A few sentences: what the skip path brings to the block."""
        measured = [s for s in self.steps if s.finite]
        unit = "step" if self.trains else "batch"
        block = name_of(self.facts["block"]) if "block" in self.facts else "the block"
        if not measured:
            return f"No {unit} with finite gradients at {block} was measured."
        if all(s.skip == 0 for s in measured):
            return (
                f"No gradient passes the skip taps to {block} in {_count(measured, unit)}: their weights in the "
                "projector are still zero, as a fresh patch has them."
            )
        ratio, between = _median(s.ratio for s in measured), _between(s.cosine for s in measured)
        text = (
            f"In the median over {_count(measured, unit)}, the skip gradient at {block} is {ratio:.3g} times as long "
            f"as the main one, at a cosine of {_number(self.median_cosine)} to it{between}. "
        )
        if not self.windows:
            text += f"No window of {self.settings.window} is complete, so there are no variances. "
        else:
            windows = f"{_count(self.windows, 'window')} of {self.settings.window}"
            c, delta = self.typical("c"), _number(self.median_delta)
            correlation = f"|correlation| of both paths' noise {_number(self.typical('correlation'))}"
            cross = f"delta {delta}, {correlation}"
            if c < SMALL_C:
                cross = (
                    f"{correlation}; delta ({delta}) says little with so small a c: it may reach 2 / sqrt(c) = "
                    f"{_number(self.typical('delta_bound'))}"
                )
            text += f"Over {windows}: variance {_number(c)} times the main path's (c), {cross}. {self._condition()} "
            text += self._predicted()
        if not self.trains:
            return text.rstrip()
        if self.transition is not None:
            return f"{text}From step {self.transition} on the skip gradient is the shorter one (t_trans)."
        if self.too_short:
            known = _count([s for s in measured if not math.isnan(s.ratio)], unit)
            return f"{text}t_trans cannot be told from {known}: it takes {self.transition_takes}."
        return f"{text}It did not settle below the main one (no t_trans)."

    def _condition(self) -> str:
        known = [c for c in self.conditions() if c is not None]
        if known:
            return f"The detaching condition holds in {sum(known)} of {len(known)} windows."
        needed, limit = self.typical("product_needed"), self.typical("product_limit")
        if math.isnan(needed):
            return "The detaching condition takes windows of two steps."
        where = f"where L * gamma is at least {needed:.3g}"
        if math.isinf(needed):
            where = "at no L * gamma"
        elif needed == 0:
            where = "at every L * gamma" if limit == math.inf else f"where L * gamma is at most {_number(limit)}"
        return f"The detaching condition holds {where} (smoothness times step size; median)."

    def _predicted(self) -> str:
        """What detaching gains in a step by the measured curvature; nothing where there is none."""
        curvature, needed = self.typical("curvature"), self.typical("product_needed")
        if math.isnan(curvature):
            return ""
        text = f"Curvature along the full gradient {_number(curvature)}, along the main one "
        text += f"{_number(self.typical('main_curvature'))}"
        gains = self.gains()
        if not gains:
            reached = curvature > 0 and 0 < needed < math.inf
            size = needed / curvature if reached else math.nan
            takes = f", so the detaching condition takes a step size of {_number(size)}. "
            return text + (takes if reached else ". ")
        told = {name: _number(_median(one[name] for one in gains)) for name in GAINS}
        return (
            f"{text}: predicted gain of detaching in one plain step {told['detach_gain']} by that condition, "
            f"{told['detach_gain_own']} with each path's own curvature, {told['same_length_gain']} of a main gradient "
            "as long as the full one. "
        )

    def gains(self) -> list[dict[str, float]]:
        """What detaching is predicted to gain in each window, by `GAINS`; empty without curvature or step size."""
        settings = self.settings
        found = [w.to_dict(settings.smoothness, settings.step_size) for w in self.windows]
        return [{name: one[name] for name in GAINS} for one in found if "detach_gain" in one]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows: median and range of what the paper names."""
        measured = [s for s in self.steps if s.finite]
        rows = [
            _row("||g_skip|| / ||g_main||", (s.ratio for s in measured)),
            _row("cosine", (s.cosine for s in measured)),
        ]
        names = {
            "main_trace": "tr Sigma_main",
            "skip_trace": "tr Sigma_skip",
            "c": "c = tr Sigma_skip / tr Sigma_main",
            "rho": "rho = ||s|| / ||m||",
            "delta": "delta",
            "delta_bound": "largest delta at this c, 2 / sqrt(c)",
            "correlation": "|correlation| of both paths' noise",
            "product_needed": "L gamma that the detaching condition needs",
        }
        rows += [_row(label, (getattr(w, name) for w in self.windows)) for name, label in names.items()]
        if any(w.full_bend is not None for w in self.windows):
            rows += [_row(label, (getattr(w, name) for w in self.windows)) for name, label in CURVED.items()]
        rows += [_row(GAINS[name], (one[name] for one in self.gains())) for name in GAINS if self.gains()]
        rows += [_row(f"SNR {path}", (w.snr(path) for w in self.windows)) for path in PATHS]
        against = sum(w.alignment < 0 for w in self.windows)
        rows.append(["windows with <m, s> < 0", f"{against} of {len(self.windows)}", "", ""])
        if known := [c for c in self.conditions() if c is not None]:
            rows.append(["windows where the detaching condition holds", f"{sum(known)} of {len(known)}", "", ""])
        return ["quantity", "median", "lowest", "highest"], rows


def median_interval(values: Iterable[float]) -> tuple[float, float]:
    """95 % interval of the median, by order statistics (the sign test); the whole line where there are too few values.

    Values count as independent, which batches of one data set are about, and training steps are not.
    """
    known = sorted(v for v in values if not math.isnan(v))
    n, tail, rank = len(known), 0.0, 0
    while rank < n // 2 and (tail + math.comb(n, rank) / 2**n) <= 0.025:
        tail += math.comb(n, rank) / 2**n
        rank += 1
    return (known[rank - 1], known[n - rank]) if rank else (-math.inf, math.inf)


def _between(values: Iterable[float]) -> str:
    """The interval in brackets; nothing where there are too few values."""
    low, high = median_interval(values)
    return "" if math.isinf(low) else f" (95 %: {low:.3g} to {high:.3g})"


def _median(values: Iterable[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return median(known) if known else math.nan


def _number(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.3g}"


def _count(things: Sized, unit: str) -> str:
    plural = {"batch": "batches"}.get(unit, f"{unit}s")
    return f"{len(things)} {unit if len(things) == 1 else plural}"


def _row(label: str, values: Iterable[float]) -> list[str]:
    known = [v for v in values if not math.isnan(v)]
    return [label, *(["-"] * 3 if not known else [f"{v:.3g}" for v in (median(known), min(known), max(known))])]


def run_folders(paths: Sequence[Path]) -> dict[str, Path]:
    """Folders of measured runs, by a short name of each: of results, training runs, a sweep's points or whole sweeps.

    Files beside a sweep's points, as a shell's `sweeps/lr/*` gives them, are passed over.

    Raises:
        InputError: a folder without results, or one that is named twice.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_file() and len(paths) > 1:
            continue
        near = ([path] if not place else sorted(path.glob(place)) for place in PLACES)
        measured = ([f for f in some if (f / LOG).is_file() or (f / WHOLE).is_file()] for some in near)
        inside = next(filter(None, measured), None)
        if inside is None:
            raise InputError(
                f"{path}: no {LOG} or {WHOLE} there, nor in a run or a sweep's runs under it: give the folders of runs "
                "that were measured (a Gradients binding in their gin configuration)"
            )
        found += inside
    resolved = [folder.resolve() for folder in found]
    twice = next((folder for folder in resolved if resolved.count(folder) > 1), None)
    if twice is not None:
        raise InputError(f"{twice}: named twice")
    if not found:
        raise InputError(f"{', '.join(map(str, paths))}: files, but no folder of a measured run among them")
    runs = [folder.parent if folder.name == "gradients" else folder for folder in resolved]
    if len({run.name for run in runs}) == 1 and runs[0].name.startswith("seed"):  # it tells nothing
        runs = [run.parent for run in runs]
    common = os.path.commonpath(runs) if len(runs) > 1 else runs[0].parent
    return dict(zip([run.relative_to(common).as_posix() for run in runs], found, strict=True))


def ordered(results: Mapping[str, GradientsResult]) -> dict[str, GradientsResult]:
    """Runs by falling learning rate, as in the paper's table; those without one last."""
    falling = sorted(results, key=lambda name: -float(results[name].facts.get("learning_rate") or -math.inf))
    return {name: results[name] for name in falling}


def runs_table(results: Mapping[str, GradientsResult]) -> tuple[list[str], list[list[str]]]:
    """Learning rate, t_trans, median cosine and median delta of each run, by its name; head and rows of text.

    t_trans is "/" where the skip gradient never settled below the main one, as in the paper, and "-" where too few
    steps were measured to tell.
    """
    rows = []
    for name, result in ordered(results).items():
        rate, transition = result.facts.get("learning_rate"), result.transition
        settled = str(transition) if transition is not None else "-" if result.too_short else "/"
        medians = ["-" if math.isnan(v) else f"{v:.4f}" for v in (result.median_cosine, result.median_delta)]
        rows.append([name, f"{rate:g}" if rate else "-", settled, *medians, str(len(result.steps))])
    return ["run", "lr", "t_trans", "median cos", "median delta", "steps"], rows


def runs_dict(results: Mapping[str, GradientsResult]) -> list[dict[str, Any]]:
    """The table as plain JSON values."""
    return plain([
        {
            "run": name,
            "learning_rate": result.facts.get("learning_rate"),
            "transition_step": result.transition,
            "median_cosine": result.median_cosine,
            "median_delta": result.median_delta,
            "steps": len(result.steps),
            "facts": result.facts,
        }
        for name, result in ordered(results).items()
    ])  # fmt: skip
