"""Running sums of main and skip gradients over windows of training steps, and t_trans.

Source: "Detached Skip-Links and R-Probe", appendix C.2 and C.4. Sums of vectors are float32 on the gradients' device
(two of them, whatever the window), sums of numbers float64. A variance that is a small share v of the mean square may
be off by K * 6e-8 / v of itself at worst; on random vectors it was a thousandth of that.
"""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from llava_patch.core.errors import CheckpointError, brief
from llava_patch.core.files import atomic
from llava_patch.core.stored import check_values, numbers, read_tensors_and_metadata
from llava_patch.measurements.gradients.moments import Moments, Step

STATE = "llava_patch_gradients.safetensors"
"""File of an unfinished window, in the folder of a checkpoint or of the results."""
_ADVICE = ": go on from an earlier checkpoint, or delete it to begin a new window"


class Window:
    """Running sums over windows of K steps, one after the other.

    Holds two float32 vectors of the gradient's length and a few numbers, however long the window.
    """

    def __init__(self, size: int) -> None:
        """Begin with nothing; `size` is K, at least 2."""
        self.size = size
        self.last = 0  # number of the last training step that was added, also to a window that is complete
        self._begin()

    def _begin(self) -> None:
        self._vectors: dict[str, Tensor] = {}  # sums of main and skip gradients
        self._sums = dict.fromkeys(("main", "skip", "full", "inner"), 0.0)
        self._rates: list[float] = []
        self._bends: list[tuple[float, float]] = []  # of the full and the main gradient
        self._first = self._count = 0

    @torch.no_grad()
    def add(
        self,
        step: int,
        main: Tensor,
        full: Tensor,
        learning_rate: float | None = None,
        bends: tuple[float, float] | None = None,
    ) -> tuple[Step, Moments | None]:
        """Add a step; one transfer to the host.

        Args:
            step: number of the training step, from 1.
            main: main gradient, float32 [n], averaged over micro-batches and ranks.
            full: full gradient, the same.
            learning_rate: of the measured block in this step.
            bends: (<g_full, H g_full>, <g_main, H g_main>), see `curvature.bends`; None: not measured.

        Returns:
            (the step, the moments of the window that it completed or None). A step whose gradients are not finite is
            reported and enters no window.
        """
        skip = full - main
        if not self._vectors:
            self._vectors = {"main": torch.zeros_like(main), "skip": torch.zeros_like(skip)}
        m, s = self._vectors.values()
        if m.shape != main.shape:
            raise CheckpointError(
                f"gradients of {len(main)} values, but {STATE} has sums of {len(m)}: it is of another block or model; "
                "delete it to begin a new window"
            )
        squares = [_dot(main, main), _dot(skip, skip), _dot(full, full), _dot(main, skip)]
        finite = torch.stack(squares).isfinite().all()
        m += torch.where(finite, main, 0)
        s += torch.where(finite, skip, 0)
        *numbers, main_sum, skip_sum, product = torch.stack([*squares, _dot(m, m), _dot(s, s), _dot(m, s)]).tolist()
        bends = bends if bends is not None and all(map(math.isfinite, bends)) else None
        found = Step(step, numbers[0], numbers[1], numbers[2], numbers[3], learning_rate, *(bends or ()))
        self.last = step
        if not all(map(math.isfinite, numbers)):
            return found, None
        for name, number in zip(self._sums, numbers, strict=True):
            self._sums[name] += number
        self._first = self._first if self._count else step
        self._count += 1
        self._rates += [] if learning_rate is None else [learning_rate]
        self._bends += [] if bends is None else [bends]
        if self._count < self.size:
            return found, None
        k = self._count
        moments = Moments(
            first=self._first,
            last=step,
            count=k,
            main_square=self._sums["main"] / k,
            skip_square=self._sums["skip"] / k,
            full_square=self._sums["full"] / k,
            inner=self._sums["inner"] / k,
            main_mean=main_sum / k**2,
            skip_mean=skip_sum / k**2,
            mean_inner=product / k**2,
            learning_rate=math.fsum(self._rates) / len(self._rates) if self._rates else None,
            full_bend=math.fsum(full for full, _ in self._bends) / k if len(self._bends) == k else None,
            main_bend=math.fsum(main for _, main in self._bends) / k if len(self._bends) == k else None,
        )
        self._begin()
        return found, moments

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The unfinished window as tensors and plain values; no tensors at a window's beginning."""
        values: dict[str, Any] = {"size": self.size, "sums": self._sums, "rates": self._rates}
        if self._bends:
            values["bends"] = self._bends
        return self._vectors, {**values, "first": self._first, "last": self.last, "count": self._count}

    def save(self, path: str | Path) -> Path:
        """Write the unfinished window atomically into a safetensors file; returns its path."""
        from safetensors.torch import save_file

        tensors, values = self.state()
        with atomic(Path(path)) as temporary:
            held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            save_file(held, temporary, metadata={"format": "pt", "window": json.dumps(values)})
        return Path(path)

    @classmethod
    def load(
        cls, path: str | Path, size: int, device: torch.device | str = "cpu", length: int | None = None
    ) -> "Window":
        """A window that goes on from what `save` wrote, in a run of windows of `size` and gradients on `device`.

        `length`: n of its gradients, where it is known.

        Raises:
            CheckpointError: no such file, a damaged one, or one of windows or gradients of another length.
        """
        path = Path(path)
        tensors, metadata = read_tensors_and_metadata(path, advice=_ADVICE)
        check_values(tensors, path)
        try:
            values = json.loads(metadata["window"])
            window = cls(values["size"])
            window._vectors = {name: tensors[name].to(device) for name in ("main", "skip")} if tensors else {}
            window._sums = {name: float(values["sums"][name]) for name in window._sums}
            window._rates = [float(rate) for rate in values["rates"]]
            window._bends = [(float(full), float(main)) for full, main in values.get("bends", ())]
            window._first, window.last, window._count = (int(values[n]) for n in ("first", "last", "count"))
            wrong = [t for t in window._vectors.values() if t.dtype != torch.float32 or t.dim() != 1]
            lengths = set() if wrong else {len(t) for t in window._vectors.values()}
            if wrong or set(tensors) - {"main", "skip"} or len(lengths) > 1 or (window._count > 0 and not lengths):
                raise ValueError("its sums of gradients are no two vectors of one length")
            if length is not None and lengths - {length}:
                raise ValueError(f"its sums of gradients have {lengths.pop()} values, expected {length}")
            if not 0 <= window._count < window.size or not numbers(
                [*window._sums.values(), *window._rates, *itertools.chain(*window._bends)]
            ):
                raise ValueError("its numbers are none")
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: no running sums of gradient statistics ({brief(error)}){_ADVICE}"
            ) from error
        if window.size != size:
            raise CheckpointError(
                f"{path}: its windows have {window.size} steps, but Gradients.window = {size}: keep it at "
                f"{window.size} for the run that goes on"
            )
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
