"""The gradient reach: its settings, what it found on one model and under several variants, and what is asked of it."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from llava_patch.core.errors import SettingError
from llava_patch.data.target import Target
from llava_patch.measurements.base import Measurement, Result, default_split, words
from llava_patch.settings.checks import flag, integer
from llava_patch.settings.methods import VARIANTS

EMBEDDING, BLOCK, AFTER, PROJECTOR, STACK = (
    "tower embeddings", "tower block", "tower, after blocks", "projector", "DeepStack projector",
)  # fmt: skip
TOKENS, LAYER, SIDE, NORM, HEAD, OTHER = (
    "token embeddings", "decoder layer", "side branch layer", "final norm", "head", "other",
)  # fmt: skip
LORA = " LoRA"  # behind a part's name: what peft has put into it
FROZEN, NONE, ZERO, NONZERO = "frozen", "none", "zero", "nonzero"
LF, PC = "lf", "pc"


@dataclass(frozen=True)
class Reach:
    """Settings of the gradient reach; the defaults are this project's choice.

    Attributes:
        samples: how many samples at most, each one forward and one backward pass; None: all.
        everything: ask for a gradient of every parameter, as if all of the model trained, the vision tower included;
            False: as the flags stand.
    """

    samples: int | None = 4
    everything: bool = False

    def __post_init__(self) -> None:
        if self.samples is not None:
            integer("Reach", "samples", self.samples, 1)
        flag("Reach", "everything", self.everything)


@dataclass(frozen=True)
class Part:
    """A part of a model, the smallest that the measurement tells apart."""

    kind: str  # one of the names above
    number: int | None = None  # of a tower block (from 1), decoder or side-branch layer (from 0)
    # What a decoder layer does with the image: "below split", "text only", "fusion", "image reset" (PC), "image keys"
    # (KV); "" in a model that is not routed.
    role: str = ""


@dataclass(frozen=True)
class PartReach:
    """What arrived at one part of the model."""

    part: Part
    parameters: int  # how many values it has
    asking: int  # how many of them ask for a gradient
    tensors: int  # how many of its tensors do
    reached: int  # how many of these got one (of zeros too)
    state: str  # "frozen": nothing asks; "none": no gradient arrived; "zero": exact zeros; "nonzero"
    norm: float  # root of the mean over samples of the squared norm of all its gradients


@dataclass(frozen=True)
class SideReach:
    """The gradient of the loss at the side branch's output."""

    norm: float | None  # root mean square over samples of its norm; None: none arrived
    layers: dict[int, float]  # norm of what came through each layer that reads it, by number; L: the decoder's end
    nonzero: tuple[int, ...]  # the layers through which anything but zeros came


@dataclass(frozen=True)
class ReachResult(Result):
    """Where a training step's gradient goes."""

    NAME, TITLE = "reach", "gradient reach"
    FIGURE = "llava_patch.measurements.reach.figures:reach_figure"

    name: str  # of the patch, as tables say it
    parts: tuple[PartReach, ...]  # every part of the model, from the image to the head
    side: SideReach | None  # the side branch's output; None without a side branch
    n_layers: int  # L
    split: int | None  # first routed layer; None where nothing is routed
    samples: int  # how many were measured
    loss: float  # their mean loss
    dtype: str  # of the decoder
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

    def finding(self) -> str:
        """Whether all that trains can learn."""
        lost = [f for f in self.parts if f.asking and f.state in (NONE, ZERO)]
        if not any(f.asking for f in self.parts):
            return "Nothing would train: no parameter asks for a gradient."
        if self.side is not None and not self.side.nonzero:
            return "The side branch cannot be trained under this patch: no gradient reaches its output."
        if lost:
            names = "; ".join(name for name, _ in merged(lost))
            return f"Not all that is to train can learn: no gradient reaches {names}; freeze it, or change the patch."
        return "Everything that is to train gets a gradient."

    def caution(self) -> str:
        """What a norm does not say."""
        return (
            f"One backward pass for each of {self.samples} samples at these weights: that a gradient arrives is exact, "
            "its norm has no interval and does not say how fast a part learns."
        )

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

    def derived(self) -> dict[str, Any]:
        """The finding in words."""
        return {"summary": self.summary()}


_SAYS = {FROZEN: "frozen", NONE: "none", ZERO: "exactly 0", NONZERO: ""}


def merged(parts: Iterable[PartReach]) -> list[tuple[str, list[PartReach]]]:
    """Neighbouring parts of one kind, role and outcome, with a name such as "decoder layers 0-17, below split"."""
    found = []
    for _, same in groupby(parts, lambda f: (f.part.kind, f.part.role, f.state, f.asking == f.parameters)):
        members = list(same)
        part, numbers = members[0].part, [f.part.number for f in members if f.part.number is not None]
        name = part.kind
        if numbers:
            lora = LORA * name.endswith(LORA)
            plural = f"{name.removesuffix(LORA)}s{lora}"
            name = f"{name if len(numbers) == 1 else plural} {_runs(numbers)}"
        found.append((f"{name}, {part.role}" if part.role else name, members))
    return found


def _runs(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


@dataclass(frozen=True)
class ReachComparison(Result):
    """Several variants on one model and the same samples."""

    NAME, TITLE = "reach_variants", "gradient reach comparison"
    FIGURE = "llava_patch.measurements.reach.figures:comparison_figure"

    results: tuple[ReachResult, ...]  # of each variant, in the order asked for

    def of(self, variant: str) -> ReachResult | None:
        """A variant's result."""
        return next((result for result in self.results if result.variant == variant), None)

    def summary(self) -> str:
        """LF against PC, and what cannot be trained."""
        lines = []
        lf, pc = self.of(LF), self.of(PC)
        if lf is not None and pc is not None and lf.side is not None and pc.side is not None:
            lines.append(
                f"Layers through which the side branch's output gets a gradient: LF {len(lf.reading_layers)}, PC "
                f"{len(pc.reading_layers)} (the paper's 7B model: 1 and 14)."
            )
            if lf.side.norm and pc.side.norm:
                lines.append(f"Its norm in LF is {lf.side.norm / pc.side.norm:.2f} of PC's.")
        dead = [r.name for r in self.results if r.side is not None and not r.side.nonzero]
        if dead:
            lines.append(f"No gradient reaches the side branch under {', '.join(dead)}: it cannot be trained there.")
        return " ".join(lines) or "; ".join(result.summary() for result in self.results)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(head, rows)."""
        pc = self.of(PC)
        base = pc.side.norm if pc is not None and pc.side is not None else None
        rows = []
        for result in self.results:
            side = result.side
            if side is None:
                rows.append([result.name, "-", "no side branch", "-", "-"])
                continue
            norm = "none" if side.norm is None else f"{side.norm:.3g}" if side.nonzero else "exactly 0"
            ratio = f"{side.norm / base:.2f}" if base and side.norm is not None else "-"
            branch = [p for p in result.parts if p.part.kind == SIDE]
            weights = result.norm_of(SIDE)
            shown = f"{weights:.3g}" if weights else "none" if not any(p.reached for p in branch) else "exactly 0"
            end = " + end" if result.n_layers in side.nonzero else ""
            rows.append([result.name, f"{len(result.reading_layers)}{end}", norm, ratio, shown])
        return ["variant", "layers", "at its output", "to PC", "at its weights"], rows

    def derived(self) -> dict[str, Any]:
        """The finding in words."""
        return {"summary": self.summary()}


class ReachMeasurement(Measurement):
    """Which parameters get a gradient, and how the side branch gets its own.

    One backward pass a sample, in training mode, with the checkpoint's patch
    or the one that gin bindings ask for. "none": no gradient arrives at
    something that trains; "exactly 0": only zeros do. Data need answers, or
    none are given (rendered pages).

    In full:

    llava-patch reach llava-v1.5-7b data.json --gin-param "Routing.split = 18"
    """

    name = "reach"
    title = "Gradient reach"
    about = (
        "Which parameters does a training step give a gradient under this patch, and through which layers does the "
        "side branch get its own? Flags are as the checkpoint's settings set them."
    )
    alt = "Norm of the gradient that reaches each part of the model, and the side branch's output layer by layer."
    settings = Reach
    result = "llava_patch.measurements.reach.measurement:ReachResult"
    samples = 4
    report_count = ""
    words = {"everything": "--all"}  # noqa: RUF012

    def check(self, data: str, samples: int | None, **options: Any) -> None:
        """Refuse a split without variants."""
        split = options["split"]
        if split is not None and not options["variants"]:
            raise SettingError(
                f'--split {split} belongs to --variants; one routing is --gin-param "Routing.split = {split}"'
            )

    def stem(self, **options: Any) -> str:
        """A comparison has files of its own."""
        return ReachComparison.NAME if options.get("variants") else self.name

    def in_report(self, context: Any, settings: Reach) -> Result:
        """Flags are as the loader leaves them."""
        from llava_patch.measurements.reach.measure import measure_reach

        samples = context.samples(settings.samples, answers=True)
        return measure_reach(context.subject.model, samples, settings)

    def measure(
        self,
        target: Target,
        settings: Reach,
        folder: Path | None = None,
        *,
        variants: str = "",
        split: int | None = None,
    ) -> Result:
        """Measure one model, or the variants of routing on it one after the other.

        Args:
            target: the checkpoint.
            settings: how many samples, and whether every parameter is asked.
            folder: not needed.
            variants: routings to compare on a checkpoint without one, such as lf,pc,kv,ideal.
            split: with --variants: first routed layer; default: 18/32 of depth.
        """
        from llava_patch.hosts.anatomy import find
        from llava_patch.measurements.reach.measure import compare_reach, measure_reach
        from llava_patch.patching.handle import get_handle

        samples, model = target.samples(settings.samples, answers=True), target.subject.model
        settings = dataclasses.replace(settings, samples=settings.samples or len(samples))
        if variants:
            split = default_split(len(find(model).layers)) if split is None else split
            return compare_reach(model, lambda: samples, words(variants), split, settings)
        handle = get_handle(model)
        if handle is not None:  # llava loads its tower after the patch and freezes it; a training run does this too
            handle.apply_freeze()
        return measure_reach(model, samples, settings)
