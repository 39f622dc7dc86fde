"""Several runs side by side: Table 3 of the Skip-Links paper."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llava_patch.files import plain

if TYPE_CHECKING:
    from llava_patch.diagnostics.gradients.result import GradientsResult

HEAD = ["run", "lr", "t_trans", "median cos", "median delta", "steps"]


def ordered(results: "Mapping[str, GradientsResult]") -> "dict[str, GradientsResult]":
    """Runs by falling learning rate, as in the paper's table; those without one last."""
    falling = sorted(results, key=lambda name: -float(results[name].facts.get("learning_rate") or -math.inf))
    return {name: results[name] for name in falling}


def runs_table(results: "Mapping[str, GradientsResult]") -> tuple[list[str], list[list[str]]]:
    """Learning rate, t_trans, median cosine and median delta of each run; head and rows of text.

    t_trans is "/" where the skip gradient never settled below the main one, as in the paper.

    Args:
        results: by the run's name.
    """
    rows = []
    for name, result in ordered(results).items():
        rate = result.facts.get("learning_rate")
        rows.append(
            [
                name,
                f"{rate:g}" if rate else "-",
                "/" if result.transition is None else str(result.transition),
                _number(result.median_cosine),
                _number(result.median_delta),
                str(len(result.steps)),
            ]
        )
    return list(HEAD), rows


def runs_dict(results: "Mapping[str, GradientsResult]") -> list[dict[str, Any]]:
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


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
