"""Settings of the gradient statistics."""

import math
from dataclasses import dataclass

from llava_patch.core.errors import SettingError
from llava_patch.settings.checks import integer, is_number

RUN, ATTACHED = "run", "attached"
FULL = (RUN, ATTACHED)


@dataclass(frozen=True)
class Gradients:
    """Settings of the gradient statistics; the defaults are this project's choice unless a source is named.

    Attributes:
        block: block of the vision tower whose parameters are looked at, from 1; None: the shallowest tapped one (the
            Skip-Links paper: "the first skip-link block", 6).
        full: what the full gradient is: "run", through the taps as the run has them (appendix C, "a standard forward
            and backward pass"), or "attached", as if no tap were detached: what `detach` keeps away from the block.
        every: measure every so many training steps.
        window: measured steps K of one window (appendix C.2 names no number).
        start: the first training step that is measured, from 1.
        steps: measure in so many training steps from there (the paper: 1300); None: until training ends.
        transition_windows: the skip gradient counts as settled below the main one when it stays there for so many
            windows (appendix C.4: "for consecutive windows").
        smoothness: L of condition (7); None: only the product of L and the step size that it needs is reported.
        step_size: its step size, gamma; None: the learning rate of the run (of the measured block, where it trains).
    """

    block: int | None = None
    full: str = RUN
    every: int = 1
    window: int = 50
    start: int = 1
    steps: int | None = None
    transition_windows: int = 3
    smoothness: float | None = None
    step_size: float | None = None

    def __post_init__(self) -> None:
        if self.full not in FULL:
            raise SettingError(f'Gradients.full = {self.full!r}: expected "{RUN}" or "{ATTACHED}"')
        for name in ("every", "window", "start", "transition_windows", "block", "steps"):
            if name not in ("block", "steps") or getattr(self, name) is not None:
                integer("Gradients", name, getattr(self, name), 2 if name == "window" else 1)
        for name in ("smoothness", "step_size"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and math.isfinite(value) and value > 0):
                raise SettingError(f"Gradients.{name} = {value!r}: expected a number above 0, or None")

    def measures(self, step: int) -> bool:
        """Whether a training step (from 1) is measured."""
        behind = step - self.start
        return behind >= 0 and behind % self.every == 0 and (self.steps is None or behind < self.steps)
