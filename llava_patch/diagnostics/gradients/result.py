"""What the gradient statistics of one run came to."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from llava_patch import files
from llava_patch.diagnostics.gradients.log import LOG, StepLog, read_lines
from llava_patch.diagnostics.gradients.settings import Gradients
from llava_patch.diagnostics.gradients.statistics import Moments, Step, transition_step
from llava_patch.errors import CheckpointError

__all__ = ["LOG", "NAME", "GradientsResult", "StepLog"]
NAME = "gradients"


@dataclass(frozen=True)
class GradientsResult:
    """Measured steps and the windows over them.

    Attributes:
        steps: every measured step, in order.
        windows: the complete windows of `settings.window` steps.
        settings: of the measurement.
        facts: about the run: learning_rate, block, fusion, batch, checkpoint, trains (False: one fixed checkpoint).
    """

    steps: list[Step]
    windows: list[Moments]
    settings: Gradients = field(default_factory=Gradients)
    facts: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def transition(self) -> int | None:
        """t_trans in training steps, or None; see `transition_step`."""
        if not self.trains:
            return None
        return transition_step(self.steps, self.settings.window, self.settings.transition_windows)

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
        return _median(w.delta for w in self.windows)

    def over_windows(self, value: Callable[[Moments], float]) -> float:
        """Median of something over the complete windows; NaN without one."""
        return _median(map(value, self.windows))

    def conditions(self) -> list[bool | None]:
        """Whether condition (7) holds in each window; None where L, gamma or a second step is missing."""
        settings = self.settings
        return [w.to_dict(settings.smoothness, settings.step_size)["condition"] for w in self.windows]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; NaN becomes null."""
        settings = self.settings
        return files.plain({
            "facts": self.facts,
            "settings": asdict(settings),
            "transition_step": self.transition,
            "median_cosine": self.median_cosine,
            "median_delta": self.median_delta,
            "windows": [w.to_dict(settings.smoothness, settings.step_size) for w in self.windows],
            "steps": [s.to_dict() for s in self.steps],
        })  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GradientsResult":
        """Read what `to_dict` made; what follows from it is worked out again."""
        return cls(
            [Step.from_dict(s) for s in values["steps"]],
            [Moments.from_dict(w) for w in values["windows"]],
            Gradients(**values["settings"]),
            dict(values["facts"]),
        )

    @classmethod
    def read(cls, folder: str | Path) -> "GradientsResult":
        """Read a run's folder, also while it trains: its log, or without one its gradients.json.

        Raises:
            CheckpointError: neither is there, or it is damaged.
        """
        log, whole = Path(folder) / LOG, Path(folder) / f"{NAME}.json"
        if not log.exists() and not whole.exists():
            raise CheckpointError(
                f"{folder}: neither {LOG} nor {whole.name} there: give the output folder of a run that was measured "
                "(a Gradients binding in its gin configuration)"
            )
        try:
            if not log.exists():
                return cls.from_dict(json.loads(whole.read_text(encoding="utf-8")))
            first, *rest = read_lines(log)
            return cls(
                [Step.from_dict(e) for e in rest if e["kind"] == "step"],
                [Moments.from_dict(e) for e in rest if e["kind"] == "window"],
                Gradients(**first["settings"]),
                dict(first["facts"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            place = log if log.exists() else whole
            raise CheckpointError(f"{place}: damaged gradient statistics ({error!r})") from error

    def summary(self) -> str:
        """Two or three sentences: what the skip path brings to the block."""
        raise NotImplementedError

    def save(self, folder: str | Path, name: str = NAME) -> tuple[Path, Path]:
        """Write `<name>.json` and `<name>.png` into a folder, each atomically.

        Returns:
            The two paths.
        """
        from llava_patch.diagnostics.gradients.figure import gradients_figure

        folder = Path(folder)
        json_path = files.write_json(folder / f"{name}.json", self.to_dict())
        return json_path, gradients_figure(self, folder / f"{name}.png")


def _median(values: Any) -> float:
    known = [v for v in values if not math.isnan(v)]
    return median(known) if known else math.nan
