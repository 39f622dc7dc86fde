"""Single steps put together: what predicts the sign and the size of the gain of detaching, over a seed's starts."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llava_patch.tools.evidence.findings import Effect, Found
from llava_patch.tools.evidence.statistics import resampled, spearman
from llava_patch.tools.evidence.studies.detach.starts import STARTS

CLEAR = 2.0  # standard errors that a gain must be away from 0 before its sign counts
RULES: dict[str, Callable[[dict[str, float], dict[str, float]], float]] = {
    "condition (7)": lambda cell, tower: cell["predicted"],
    "own curvatures": lambda cell, tower: cell["predicted_own"],
    "variance dominance": lambda cell, tower: float(np.log(max(tower["c"], 1e-12))),
    "cosine": lambda cell, tower: -tower["cosine"],
    "SNR": lambda cell, tower: float(np.log(tower["snr_main"] / tower["snr_full"])),
}
"""What each predictor says of a cell: positive where it says that detaching gains."""


class Cells:
    """The cells of one seed: [starts, cells of a start], every start with as many.

    Intervals draw starts, as the cells of one start are no independent samples.
    """

    def __init__(self, starts: Sequence[dict[str, Any]]) -> None:
        """Of the results of `one_step`, one a start."""
        rows = [[(cell, window) for window in one["windows"] for cell in window["cells"]] for one in starts]
        self.count = len(rows)
        self.first = [one["windows"][0]["block"] for one in starts]  # at the first tapped block, before any step
        self.trained = np.array([one["start"]["projector"] == "trained" for one in starts])
        self.fresh = np.array([one["start"]["projector"] == "fresh" for one in starts])
        self.gain, self.error = (_table(rows, lambda cell, _, name=name: cell[name]) for name in ("gain", "gain_error"))
        self.same = _table(rows, lambda cell, _: cell["same"])
        self.gamma = _table(rows, lambda cell, _: cell["gamma"])
        # Where a step goes further than the curvature at its beginning says anything of.
        self.within = _table(rows, lambda cell, window: abs(window["tower"].get("curvature", 0)) * cell["gamma"]) < 1
        self.after = _table(rows, lambda _, window: window["after"])
        self.rules = {
            name: _table(rows, lambda cell, window, rule=rule: rule(cell, window["tower"]))
            for name, rule in RULES.items()
        }
        self.clear = np.abs(self.gain) > CLEAR * self.error

    def signs(self, rule: str, where: np.ndarray | None = None) -> Effect:
        """Share of right signs among clear cells, the mean of those where detaching gains and where it loses.

        So any constant guess has 0.5. `where`: bool [starts, cells].
        """
        return self._of([self._hits(rule, where)], _balanced)

    def better(self, rule: str, other: str) -> Effect:
        """How much larger that share is by one rule than by another."""
        return self._of(
            [self._hits(rule, None), self._hits(other, None)], lambda one, two: _balanced(one) - _balanced(two)
        )

    def plain(self, rule: str, where: np.ndarray | None = None) -> tuple[int, int]:
        """(right signs, clear cells)."""
        hits = self._hits(rule, where).sum(0)
        return int(hits[0] + hits[2]), int(hits[1] + hits[3])

    def ranks(self, rule: str, mixed: bool = False) -> Effect:
        """Rank correlation with the measured gain among steps of one size, the mean over the sizes.

        `mixed` gives each start what the rule says of the next one.
        """
        sizes = np.unique(self.gamma)
        at = [np.flatnonzero(self.gamma[0] == size) for size in sizes]
        found = np.roll(self.rules[rule], 1, 0) if mixed else self.rules[rule]

        def correlation(drawn: np.ndarray) -> np.ndarray:
            chosen = drawn.astype(int)
            each = [
                spearman(
                    found[:, one][chosen].reshape(len(drawn), -1), self.gain[:, one][chosen].reshape(len(drawn), -1)
                )
                for one in at
            ]
            return np.mean(each, axis=0)

        return resampled([np.arange(self.count)], correlation)

    def shorter(self) -> Effect:
        """Median share of the gain, where detaching clearly gains, that is gone at the full step's length."""
        won = self.clear & (self.gain > 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            gone = np.where(won, 1 - self.same / self.gain, np.nan)

        def middle(drawn: np.ndarray) -> np.ndarray:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # draws without a clear gain are left out
                return np.asarray(np.nanmedian(gone[drawn.astype(int)].reshape(len(drawn), -1), axis=1))

        return resampled([np.arange(self.count)], middle)

    def agreement(self) -> Effect:
        """Cosine of main and skip gradient at trained projectors' starts minus that at fresh ones', mean of each."""
        cosine = np.array([block["cosine"] for block in self.first])

        def gap(drawn: np.ndarray) -> np.ndarray:
            place = drawn.astype(int)
            sides = [
                (cosine[place] * is_in[place]).sum(1) / is_in[place].sum(1) for is_in in (self.trained, self.fresh)
            ]
            return np.asarray(sides[0] - sides[1])

        with np.errstate(invalid="ignore"):  # draws without one kind are left out
            return resampled([np.arange(self.count)], gap)

    def of(self, name: str, kind: np.ndarray) -> list[float]:
        """A figure of the first tapped block at the starts of one kind."""
        return [block[name] for block, is_in in zip(self.first, kind, strict=True) if is_in]

    def _hits(self, rule: str, where: np.ndarray | None) -> np.ndarray:
        """A start's (right, all) where detaching gains, (right, all) where it loses: [starts, 4]."""
        asked = self.clear if where is None else self.clear & where
        right = np.sign(self.rules[rule]) == np.sign(self.gain)
        parts = [asked & side for side in (self.gain > 0, self.gain < 0)]
        return np.stack([count for part in parts for count in ((part & right).sum(1), part.sum(1))], 1).astype(float)

    def _of(self, hits: list[np.ndarray], figure: Callable[..., np.ndarray]) -> Effect:
        columns = [np.arange(self.count)]
        return resampled(columns, lambda drawn: figure(*(one[drawn.astype(int)].sum(1) for one in hits)))


def by_seed(found: Found) -> list[Cells]:
    """The cells of each seed for which every start was done that was done for any."""
    done = [found[f"one/{start.name}"] for start in STARTS if f"one/{start.name}" in found]
    by_start = [{one["seed"]: one for one in results} for results in done]
    seeds = sorted(set.intersection(*map(set, by_start))) if by_start else []
    return [Cells([results[seed] for results in by_start]) for seed in seeds]


def _balanced(hits: np.ndarray) -> np.ndarray:
    """Of [draws, 4]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((hits[:, 0] / hits[:, 1] + hits[:, 2] / hits[:, 3]) / 2)


def _table(rows: list[list[tuple[dict[str, float], Any]]], value: Callable[..., float]) -> np.ndarray:
    return np.array([[value(cell, window) for cell, window in row] for row in rows])
