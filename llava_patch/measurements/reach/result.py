"""What a gradient reaches, as a result that is saved and drawn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from llava_patch.measurements.reach import groups
from llava_patch.measurements.reach.groups import Part
from llava_patch.measurements.reach.settings import Reach
from llava_patch.settings.methods import VARIANTS

FROZEN, NONE, ZERO, NONZERO = "frozen", "none", "zero", "nonzero"


@dataclass(frozen=True)
class PartReach:
    """What arrived at one part of the model.

    Attributes:
        part: which.
        parameters: how many values it has.
        asking: how many of them ask for a gradient.
        tensors: how many of its tensors do.
        reached: how many of these got one (of zeros too).
        state: "frozen": nothing asks; "none": no gradient arrived; "zero": exact zeros; "nonzero".
        norm: root of the mean over samples of the squared norm of all its gradients.
    """

    part: Part
    parameters: int
    asking: int
    tensors: int
    reached: int
    state: str
    norm: float


@dataclass(frozen=True)
class SideReach:
    """The gradient of the loss at the side branch's output.

    Attributes:
        norm: root mean square over samples of its norm; None: none arrived.
        layers: norm of what came through each layer that reads it, by layer number; L: the decoder's end.
        nonzero: the layers through which anything but zeros came.
    """

    norm: float | None
    layers: dict[int, float]
    nonzero: tuple[int, ...]


@dataclass(frozen=True)
class ReachResult:
    """Where a training step's gradient goes.

    Attributes:
        name: of the patch, as tables say it.
        parts: every part of the model, from the image to the head.
        side: the side branch's output; None without a side branch.
        n_layers: L.
        split: first routed layer; None where nothing is routed.
        samples: how many were measured.
        loss: their mean loss.
        dtype: of the decoder.
        settings: the settings used.
    """

    name: str
    parts: tuple[PartReach, ...]
    side: SideReach | None
    n_layers: int
    split: int | None
    samples: int
    loss: float
    dtype: str
    settings: Reach = field(default_factory=Reach)

    @property
    def variant(self) -> str:
        """The routing's variant; the whole name where nothing is routed."""
        return next((word for word in self.name.split(" + ") if word in VARIANTS), self.name)

    def of(self, kind: str) -> list[PartReach]:
        """The parts of a kind."""
        return [found for found in self.parts if found.part.kind == kind]

    def norm_of(self, kind: str) -> float:
        """The norm of all gradients of a kind of part together."""
        return sum(found.norm**2 for found in self.of(kind)) ** 0.5

    def summary(self) -> str:
        """What was found."""
        asking, total = sum(p.asking for p in self.parts), sum(p.parameters for p in self.parts)
        what = "would train" if self.settings.everything else "train"
        line = f"{self.name}: {asking:,} of {total:,} parameters {what} ({asking / max(total, 1):.2%})"
        lost = [f for f in self.parts if f.state in (NONE, ZERO)]
        if asking:
            names = "; ".join(f"{name} ({_SAYS[found[0].state]})" for name, found in merged(lost))
            line += f"; no gradient reaches {names}" if lost else "; a gradient reaches every one of these parts"
        line += f". {self._side()}"
        if self.dtype == "float16":
            line += " In float16, small gradients round to zero: bfloat16 or float32 tells zeros from small values."
        return line

    def _side(self) -> str:
        if self.side is None:
            return "There is no side branch."
        if not self.side.nonzero:
            how = "is exactly zero" if self.side.norm is not None else "does not exist"
            return f"The loss's gradient at the side branch's output {how}: the side branch cannot be trained."
        through = self.reading_layers
        layers = f"{'one layer' if len(through) == 1 else f'{len(through)} layers'} ({_runs(through)})"
        end = "the decoder's end (an image position is read itself: its next token has a label)"
        ways = ([layers] if through else []) + ([end] if self.n_layers in self.side.nonzero else [])
        return (
            f"The side branch's output gets its gradient through {' and '.join(ways)}; its norm is "
            f"{self.side.norm:.3g}."
        )

    @property
    def reading_layers(self) -> tuple[int, ...]:
        """Decoder layers through which the side branch's output gets a gradient: the paper's paths."""
        return () if self.side is None else tuple(layer for layer in self.side.nonzero if layer < self.n_layers)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(head, rows): neighbouring parts with the same outcome share a row, and its norm is that of all of them."""
        total = sum(p.parameters for p in self.parts)
        rows = []
        for name, found in merged(self.parts):
            count, asking = sum(f.parameters for f in found), sum(f.asking for f in found)
            trains = "yes" if asking == count else "no" if not asking else f"{asking / count:.1%}"
            norm = sum(f.norm**2 for f in found) ** 0.5
            state = found[0].state
            shown = f"{norm:.3g}" if state == NONZERO else _SAYS[state]
            rows.append([name, f"{count:,}", f"{count / total:.2%}", trains, shown])
        return ["part", "parameters", "share", "trains", "gradient norm"], rows

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        side = None
        if self.side is not None:
            side = {**asdict(self.side), "layers": [[k, v] for k, v in self.side.layers.items()]}
        return {**asdict(self), "side": side, "summary": self.summary()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ReachResult":
        """From what `to_dict` gave."""
        values = {k: v for k, v in values.items() if k != "summary"}
        values["parts"] = tuple(PartReach(**{**found, "part": Part(**found["part"])}) for found in values["parts"])
        side = values["side"]
        if side is not None:
            values["side"] = SideReach(side["norm"], {int(k): v for k, v in side["layers"]}, tuple(side["nonzero"]))
        return cls(**{**values, "settings": Reach(**values["settings"])})

    def save(self, folder: str | Path, name: str = "reach") -> tuple[Path, Path]:
        """Write NAME.json and NAME.png; returns both paths."""
        from llava_patch.core.files import write_json
        from llava_patch.measurements.reach.figures import reach_figure

        folder = Path(folder)
        return write_json(folder / f"{name}.json", self.to_dict()), reach_figure(self, folder / f"{name}.png")


_SAYS = {FROZEN: "frozen", NONE: "none", ZERO: "exactly 0", NONZERO: ""}


def merged(parts: Iterable[PartReach]) -> list[tuple[str, list[PartReach]]]:
    """Neighbouring parts of one kind, role and outcome, with a name such as "decoder layers 0-17, below split"."""
    found = []
    for _, same in groupby(parts, lambda f: (f.part.kind, f.part.role, f.state, f.asking == f.parameters)):
        members = list(same)
        part, numbers = members[0].part, [f.part.number for f in members if f.part.number is not None]
        name = part.kind
        if numbers:
            name = f"{name if len(numbers) == 1 else _plural(name)} {_runs(tuple(numbers))}"
        found.append((f"{name}, {part.role}" if part.role else name, members))
    return found


def _plural(kind: str) -> str:
    if kind.endswith(groups.LORA):
        return f"{kind.removesuffix(groups.LORA)}s{groups.LORA}"
    return f"{kind}s"


def _runs(numbers: tuple[int, ...]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
