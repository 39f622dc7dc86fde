"""A claim, what was measured about it, its control, and the verdict that follows from them by one rule."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided at this size"
LEAST_SEEDS = 3


class Missing(KeyError):
    """A run that a finding needs has not been done."""


@dataclass(frozen=True)
class Effect:
    """A figure of one seed with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Finding:
    """One row of the report.

    Attributes:
        claim: one sentence; it says that the effect is greater than `least`.
        source: the paper's table, equation or section, or "theory".
        measured: what the effect is, its unit, and over how many samples.
        effect: one a seed.
        control: what was done to show that the figure could have come out otherwise.
        passed: whether the control came out as it must.
        gate: why the question cannot be asked here whatever the numbers say; empty: it can.
        least: the smallest effect that counts.
        values: figures beside it, one a seed.
        note: the caveat.
        short: the claim in a few words, where it belongs on the project's first page.
    """

    claim: str
    source: str
    measured: str
    effect: tuple[Effect, ...]
    control: str
    passed: bool
    gate: str = ""
    least: float = 0.0
    values: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""
    short: str = ""

    @property
    def verdict(self) -> str:
        """`HOLDS` where every seed's interval lies above `least`, `FAILS` where every one lies below, else `UNDECIDED`.

        Without its control, with a gate that is shut or with fewer than three seeds nothing is decided.
        """
        if self.gate or not self.passed or len(self.effect) < LEAST_SEEDS:
            return UNDECIDED
        if all(one.low > self.least for one in self.effect):
            return HOLDS
        return FAILS if all(one.high < self.least for one in self.effect) else UNDECIDED

    @property
    def why(self) -> str:
        """Why nothing is decided; empty where something is."""
        if self.verdict != UNDECIDED:
            return ""
        if self.gate:
            return self.gate
        if not self.passed:
            return "the control did not come out as it must"
        if len(self.effect) < LEAST_SEEDS:
            return f"{len(self.effect)} of at least {LEAST_SEEDS} seeds"
        return f"an interval holds {self.least:g}, or the seeds disagree"


class Found(Mapping[str, list[dict[str, Any]]]):
    """The results of a study's runs by name, one a seed; those of other studies by their full names."""

    def __init__(self, study: str, results: Mapping[str, list[dict[str, Any]]]) -> None:
        self.study, self.results = study, results

    def __getitem__(self, name: str) -> list[dict[str, Any]]:
        for key in (f"{self.study}/{name}", name):
            if self.results.get(key):
                return self.results[key]
        raise Missing(name)

    def __contains__(self, name: object) -> bool:
        return bool(self.results.get(f"{self.study}/{name}") or self.results.get(str(name)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)
