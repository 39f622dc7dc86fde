"""What the planted gradients say of the instrument."""

from typing import Any

import numpy as np

from llava_patch.core.plotting import IMAGE, TEXT, panels
from llava_patch.tools.evidence import statistics
from llava_patch.tools.evidence.findings import Effect, Finding, Found

TITLE = "Gradient statistics: planted effects"
ABOUT = (
    "Before the gradient statistics are believed on a model, they are shown gradients whose signal-to-noise ratio, "
    "cosine, cross-covariance and curvature are known. Five cases, from the Skip-Links paper's early picture (noise "
    "nine times the main path's, across it) to that of a projector trained with its taps; 12 windows of 64 steps, and "
    "2,000 steps on the loss itself. In a real LLaVA with a loss whose skip gradient is known, the decomposition must "
    "find its length."
)
CLOSE = 0.9
SMALL = 0.2  # errors of numbers below it are taken as shares of it


def findings(found: Found) -> list[Finding]:
    """Statistics, predictions, paths."""
    seeds, paths = found["analytic"], found["paths"]
    mixed = [[float(np.mean(case["delta_of_mixed_pairs"])) for case in one["cases"]] for one in seeds]
    linked = [case["planted"]["known"]["delta"] > 0 for case in seeds[0]["cases"]]
    apart = all(
        value < 0.1 * case["planted"]["known"]["delta"]
        for one, row in zip(seeds, mixed, strict=True)
        for case, value, has in zip(one["cases"], row, linked, strict=True)
        if has
    )
    wrong = [[_relative(case, "by_condition") for case in one["cases"]] for one in seeds]
    uneven = [not case["planted"]["even"] for case in seeds[0]["cases"]]
    seen = all(value > 0.5 for row in wrong for value, bad in zip(row, uneven, strict=True) if bad)
    return [
        Finding(
            "The gradient statistics find planted variance dominance, cosine, cross-covariance and SNR",
            "Detached Skip-Links, Assumption 4.2 and appendix C.2",
            "1 - the largest error over five cases and six figures, as a share of the planted value (of 0.2 where it "
            "is smaller); mean of 12 windows of 64 steps",
            tuple(_closeness(one["cases"]) for one in seeds),
            "main gradients paired with another step's skip gradients: delta must fall to a tenth of the planted one",
            apart,
            least=CLOSE,
            values={"delta of mixed pairs, largest": [max(row) for row in mixed]},
            short="gradient statistics find what was planted",
        ),
        Finding(
            "With each path's own curvature, the predicted gain of detaching is the one that steps on the loss have",
            "Detached Skip-Links, Proposition 4.3; theory: second order",
            "1 - the largest error of the predicted gain over five cases, as a share of that measured in 2,000 steps",
            tuple(_agreement(one["cases"]) for one in seeds),
            "a loss that is flat where the skip path's noise is: condition (7), which takes one curvature for both "
            "paths, must be wrong there by more than half",
            seen,
            least=0.8,
            values={"error of (7) on the uneven loss": [max(row) for row in wrong]},
        ),
        Finding(
            "The decomposition through a real tower finds how long the skip gradient is",
            "Detached Skip-Links, appendix C.1",
            "1 - the largest error of ‖g_skip‖ at four scales of the tap columns, as a share of what linearity says",
            tuple(_linear(one["rows"]) for one in paths),
            "the main gradient must not change with the tap columns (1 part in 1,000)",
            all(abs(row["main"] / one["rows"][0]["main"] - 1) < 1e-3 for one in paths for row in one["rows"]),
            least=0.99,
        ),
    ]


def figures(found: Found) -> dict[str, Any]:
    """Found against planted, and predicted against measured gains."""
    figure, (left, right) = panels(1, 2)
    for one in found["analytic"]:
        for case in one["cases"]:
            known, measured = case["planted"]["known"], case["found"]
            for name in known:
                left.plot(max(known[name], 1e-3), max(np.mean(measured[name]), 1e-3), "o", ms=3, color=TEXT)
            gain = case["gain"]
            for name, color, mark in (("by_condition", IMAGE, "x"), ("by_own_curvatures", TEXT, "o")):
                right.plot(np.mean(gain[name]), gain["measured"], mark, ms=4, color=color)
    left.plot([1e-3, 10], [1e-3, 10], color="0.5", lw=0.8, zorder=0)
    left.set(
        xscale="log",
        yscale="log",
        xlabel="planted",
        ylabel="found",
        title="c, delta, cosine, SNR (values <= 0 at 0.001)",
    )
    ends = right.get_xlim()
    right.plot(ends, ends, color="0.5", lw=0.8, zorder=0)
    right.plot([], [], "x", color=IMAGE, label="condition (7), one curvature")
    right.plot([], [], "o", color=TEXT, label="each path's own curvature")
    right.set(xlabel="predicted gain of detaching", ylabel="gain measured in steps", title="One step on a known loss")
    right.legend()
    return {"planted": figure}


def _closeness(cases: list[dict[str, Any]]) -> Effect:
    names = list(cases[0]["found"])
    columns = [np.asarray(case["found"][name]) for case in cases for name in names]
    planted = [case["planted"]["known"][name] for case in cases for name in names]

    def closest(*drawn: np.ndarray) -> np.ndarray:
        errors = [abs(one.mean(-1) - at) / max(abs(at), SMALL) for one, at in zip(drawn, planted, strict=True)]
        return 1 - np.max(errors, 0)

    return statistics.resampled(columns, closest)


def _relative(case: dict[str, Any], name: str) -> float:
    gain = case["gain"]
    return float(abs(np.mean(gain[name]) / gain["measured"] - 1))


def _agreement(cases: list[dict[str, Any]]) -> Effect:
    columns = [np.asarray(case["gain"]["by_own_curvatures"]) for case in cases]
    measured = [case["gain"]["measured"] for case in cases]

    def closest(*drawn: np.ndarray) -> np.ndarray:
        return 1 - np.max([abs(one.mean(-1) / at - 1) for one, at in zip(drawn, measured, strict=True)], 0)

    return statistics.resampled(columns, closest)


def _linear(rows: list[dict[str, float]]) -> Effect:
    at = next(row for row in rows if row["scale"] == 1)
    value = 1 - max(abs(row["skip"] / (row["scale"] * at["skip"]) - 1) for row in rows)
    return Effect(value, value, value)
