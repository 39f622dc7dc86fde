"""Several runs side by side: Table 3 of the Skip-Links paper."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_patch.core.errors import InputError
from llava_patch.core.files import plain
from llava_patch.measurements.gradients.log import LOG
from llava_patch.measurements.gradients.result import GradientsResult

WHOLE = "gradients.json"
PLACES = ("", "gradients", "seed*/gradients", "*/seed*/gradients")
"""Where a run's results lie: in its folder, a training run's, a sweep's point or a whole sweep."""


def run_folders(paths: Sequence[Path]) -> dict[str, Path]:
    """Folders of measured runs, by a short name of each.

    Args:
        paths: folders of results, of training runs, of a sweep's points, or of whole sweeps; files beside a sweep's
            points, as a shell's `sweeps/lr/*` gives them, are passed over.

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
        rate, medians = result.facts.get("learning_rate"), (result.median_cosine, result.median_delta)
        transition = "-" if result.too_short else "/"
        rows.append(
            [
                name,
                f"{rate:g}" if rate else "-",
                transition if result.transition is None else str(result.transition),
                *("-" if math.isnan(value) else f"{value:.4f}" for value in medians),
                str(len(result.steps)),
            ]
        )
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
