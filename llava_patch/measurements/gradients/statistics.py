"""Running sums of main and skip gradients over windows of training steps, and t_trans: mathematics only.

Source: "Detached Skip-Links and R-Probe", appendix C.2 and C.4. Sums of vectors are float32 on the gradients' device
(two of them, whatever the window), sums of numbers float64. A variance that is a small share v of the mean square may
be off by K * 6e-8 / v of itself at worst; on random vectors it was a thousandth of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from llava_patch.measurements.gradients.moments import Moments, Step


class Window:
    """Running sums over windows of K steps, one after the other.

    Holds two float32 vectors of the gradient's length and a few numbers, however long the window.
    """

    def __init__(self, size: int) -> None:
        """Begin with nothing.

        Args:
            size: steps K of a window, at least 2.
        """
        self.size = size
        self._main: Tensor | None = None
        self._skip: Tensor | None = None
        self._sums = dict.fromkeys(("main", "skip", "full", "inner"), 0.0)
        self._rates: list[float] = []
        self._first = self._last = self._count = 0

    @property
    def last(self) -> int:
        """Number of the last training step that was added, also to a window that is complete; 0: none."""
        return self._last

    @torch.no_grad()
    def add(
        self, step: int, main: Tensor, full: Tensor, learning_rate: float | None = None
    ) -> tuple[Step, Moments | None]:
        """Add a step; one transfer to the host.

        Args:
            step: number of the training step, from 1.
            main: main gradient, float32 [n], averaged over micro-batches and ranks.
            full: full gradient, the same.
            learning_rate: of the measured block in this step.

        Returns:
            (the step, the moments of the window that it completed or None). A step whose gradients are not finite is
            reported and enters no window.
        """
        skip = full - main
        if self._main is None or self._skip is None:
            self._main, self._skip = torch.zeros_like(main), torch.zeros_like(skip)
        squares = [_dot(main, main), _dot(skip, skip), _dot(full, full), _dot(main, skip)]
        finite = torch.stack(squares).isfinite().all()
        self._main += torch.where(finite, main, 0)
        self._skip += torch.where(finite, skip, 0)
        sums = [_dot(self._main, self._main), _dot(self._skip, self._skip), _dot(self._main, self._skip)]
        *numbers, main_sum, skip_sum, product = torch.stack([*squares, *sums]).tolist()
        found = Step(step, numbers[0], numbers[1], numbers[2], numbers[3], learning_rate)
        self._last = step
        if not all(map(math.isfinite, numbers)):
            return found, None
        for name, number in zip(self._sums, numbers, strict=True):
            self._sums[name] += number
        if not self._count:
            self._first = step
        self._count += 1
        if learning_rate is not None:
            self._rates.append(learning_rate)
        if self._count < self.size:
            return found, None
        k = self._count
        means = {name: total / k for name, total in self._sums.items()}
        moments = Moments(
            first=self._first,
            last=step,
            count=k,
            main_square=means["main"],
            skip_square=means["skip"],
            full_square=means["full"],
            inner=means["inner"],
            main_mean=main_sum / k**2,
            skip_mean=skip_sum / k**2,
            mean_inner=product / k**2,
            learning_rate=math.fsum(self._rates) / len(self._rates) if self._rates else None,
        )
        self._clear()
        return found, moments

    def _clear(self) -> None:
        self._main = self._skip = None
        self._sums = dict.fromkeys(self._sums, 0.0)
        self._rates = []
        self._first = self._count = 0

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The unfinished window as tensors and plain values, for `restore`; no tensors at a window's beginning."""
        tensors = {} if self._main is None or self._skip is None else {"main": self._main, "skip": self._skip}
        values = {
            "size": self.size, "sums": dict(self._sums), "rates": list(self._rates), "first": self._first,
            "last": self._last, "count": self._count,
        }  # fmt: skip
        return tensors, values

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], values: dict[str, Any]) -> "Window":
        """A window that goes on from what `state` gave; tensors on the device of the gradients to come.

        Raises:
            KeyError, TypeError: damaged values.
        """
        window = cls(values["size"])
        window._main, window._skip = tensors.get("main"), tensors.get("skip")
        window._sums = {name: float(values["sums"][name]) for name in window._sums}
        window._rates = [float(rate) for rate in values["rates"]]
        window._first, window._last, window._count = (int(values[n]) for n in ("first", "last", "count"))
        return window


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product, float64: products in float32, their sum in float64."""
    return (a * b).sum(dtype=torch.float64)


def transition_step(steps: Sequence[Step], window: int, windows: int) -> int | None:
    """The step after which the skip gradient is smaller than the main one (t_trans of appendix C.4).

    The running median of ||g_skip|| / ||g_main|| over K measured steps, moved on by one step at a time: the first step
    at which it is below 1 and stays so while as many disjoint windows go by as asked for, this one included.

    Args:
        steps: the measured steps, in order; those without a ratio count nowhere.
        window: steps K of the running median.
        windows: how many windows long it must stay below 1.

    Returns:
        The training step at which the first of these windows ends, or None: never, or not for long enough yet.
    """
    known = [s for s in steps if not math.isnan(s.ratio)]
    below = 0
    for end in range(window, len(known) + 1):
        below = below + 1 if median(s.ratio for s in known[end - window : end]) < 1 else 0
        if below == (windows - 1) * window + 1:
            return known[end - below].step
    return None
