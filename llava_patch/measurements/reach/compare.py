"""The variants of routing side by side on one model: how densely each passes a gradient to the side branch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_patch.core.errors import SettingError
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.reach import groups
from llava_patch.measurements.reach.measure import measure_reach
from llava_patch.measurements.reach.result import ReachResult
from llava_patch.measurements.reach.settings import Reach
from llava_patch.patching.handle import get_handle
from llava_patch.patching.patch import patch
from llava_patch.settings.methods import VARIANTS, Routing

LF, PC = "lf", "pc"


@dataclass(frozen=True)
class ReachComparison:
    """Several variants on one model and the same samples.

    Attributes:
        results: of each variant, in the order asked for.
    """

    results: tuple[ReachResult, ...]

    def of(self, variant: str) -> ReachResult | None:
        """A variant's result."""
        return next((result for result in self.results if result.variant == variant), None)

    def summary(self) -> str:
        """LF against PC, and what cannot be trained."""
        lines = []
        lf, pc = self.of(LF), self.of(PC)
        if lf is not None and pc is not None and lf.side is not None and pc.side is not None:
            a, b = lf.side, pc.side
            lines.append(
                f"Layers through which the side branch's output gets a gradient: LF {len(lf.reading_layers)}, PC "
                f"{len(pc.reading_layers)} (the paper's 7B model: 1 and 14)."
            )
            if a.norm and b.norm:
                lines.append(f"Its norm in LF is {a.norm / b.norm:.2f} of PC's.")
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
            branch = [p for p in result.parts if p.part.kind == groups.SIDE]
            weights = result.norm_of(groups.SIDE)
            shown = f"{weights:.3g}" if weights else "none" if not any(p.reached for p in branch) else "exactly 0"
            end = " + end" if result.n_layers in side.nonzero else ""
            rows.append([result.name, f"{len(result.reading_layers)}{end}", norm, ratio, shown])
        return ["variant", "layers", "at its output", "to PC", "at its weights"], rows

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"summary": self.summary(), "results": [result.to_dict() for result in self.results]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ReachComparison":
        """From what `to_dict` gave."""
        return cls(tuple(ReachResult.from_dict(result) for result in values["results"]))

    def save(self, folder: str | Path, name: str = "reach_variants") -> tuple[Path, Path]:
        """Write NAME.json and NAME.png; returns both paths."""
        from llava_patch.core.files import write_json
        from llava_patch.measurements.reach.figures import comparison_figure

        folder = Path(folder)
        return write_json(folder / f"{name}.json", self.to_dict()), comparison_figure(self, folder / f"{name}.png")


def compare_reach(
    model: Any,
    samples: Callable[[], Iterable[dict[str, Any]]],
    variants: Sequence[str],
    split: int,
    settings: Reach | None = None,
    progress: bool = True,
    **routing: Any,
) -> ReachComparison:
    """Route a model in one way after the other and measure each; the model is afterwards as it was.

    The side branch starts as a copy of the layers from the split on, so this compares the variants at the beginning of
    training.

    Args:
        model: a host model that is not routed.
        samples: makes the same samples for every variant.
        variants: names, as `Routing.variant` takes them.
        split: first routed layer.
        settings: as `measure_reach` takes them.
        progress: show progress bars.
        routing: other settings of `Routing`, for the variants that take them.

    Raises:
        SettingError: the model is routed already, a variant is not known, or the split does not fit.
    """
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown or not variants or len(set(variants)) != len(variants):
        raise SettingError(f"variants = {', '.join(variants)}: expected different ones of {', '.join(VARIANTS)}")
    handle = get_handle(find(model).model)
    if handle is not None and handle.routing is not None:
        raise SettingError(
            f"the model is routed already ({handle.routing}), and the variants are to be compared on one that is not: "
            "leave --variants out, or measure the checkpoint that it was trained from"
        )
    results = []
    for name in variants:
        own = {k: v for k, v in routing.items() if name == LF or k != "fusion_layers"}
        own = {} if name == "vtw" else own
        with patch(model, routing=Routing(variant=name, split=split, **own)):
            results.append(measure_reach(model, samples(), settings, progress))
    return ReachComparison(tuple(results))
