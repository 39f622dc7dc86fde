"""Settings of the fusion attention measurement, and what it found."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llava_patch.core import files
from llava_patch.core.errors import SettingError
from llava_patch.settings.checks import integer


@dataclass(frozen=True)
class FusionAttention:
    """Settings of the fusion attention measurement.

    Source: "Late-Layer Fusion is Enough" (DPVR), section 3.2.

    Attributes:
        base: what the lmms-eval task compares with; "": what the checkpoint's record names. The command has BASE.
        layers: decoder layers; None: the routed model's fusion layers (pc and kv: all deep layers), else the last.
        max_samples: stop after so many usable samples; None: take all.
        chunk: attention queries held at a time (memory against speed).
    """

    base: str = ""
    layers: tuple[int, ...] | None = None
    max_samples: int | None = None
    chunk: int = 128

    def __post_init__(self) -> None:
        if not isinstance(self.base, str):
            raise SettingError(f"FusionAttention.base = {self.base!r}: expected a checkpoint's folder or name")
        integer("FusionAttention", "chunk", self.chunk, 1)
        if self.max_samples is not None:
            integer("FusionAttention", "max_samples", self.max_samples, 1)
        if self.layers is None:
            return
        if not isinstance(self.layers, (tuple, list)) or not self.layers:
            raise SettingError(f"FusionAttention.layers = {self.layers!r}: expected layer numbers, as (31,)")
        for layer in self.layers:
            integer("FusionAttention", "layers", layer, 0)
        object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))


DEFAULTS = FusionAttention()


@dataclass(frozen=True)
class FusionAttentionResult:
    """What was measured. Mass: attention probability that text behind the image puts on image keys, mean over samples.

    Attributes:
        layers: numbers.
        trained: [layers][heads], mass in the checkpoint.
        stock: [layers][heads], mass in the base.
        n_layers: L.
        samples: number of samples.
        skipped: samples without an image or without text after it.
        checkpoint: what was measured.
        base: what with.
        settings: the settings used.
    """

    layers: list[int]
    trained: list[list[float]]
    stock: list[list[float]]
    n_layers: int
    samples: int
    skipped: int = 0
    checkpoint: str = ""
    base: str = ""
    settings: FusionAttention = field(default_factory=FusionAttention)

    def mean_ratio(self, index: int) -> float:
        """Trained mean over heads divided by the stock one, in the index-th layer; NaN for 0 / 0."""
        return _ratio(_mean(self.trained[index]), _mean(self.stock[index]))

    def ratios(self, index: int) -> list[float]:
        """The same of each head."""
        return [_ratio(a, b) for a, b in zip(self.trained[index], self.stock[index], strict=True)]

    def above_twice(self, index: int) -> int:
        """Heads whose mass is more than twice their own in the base."""
        return sum(a > 2 * b for a, b in zip(self.trained[index], self.stock[index], strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; NaN and infinity become null."""
        found = []
        for i, layer in enumerate(self.layers):
            found.append(
                {
                    "layer": layer,
                    "trained": self.trained[i],
                    "stock": self.stock[i],
                    "trained_mean": _mean(self.trained[i]),
                    "stock_mean": _mean(self.stock[i]),
                    "mean_ratio": self.mean_ratio(i),
                    "head_ratios": self.ratios(i),
                    "highest_head_trained": _highest(self.trained[i]),
                    "highest_head_stock": _highest(self.stock[i]),
                    "highest_mass_trained": max(self.trained[i]),
                    "highest_mass_stock": max(self.stock[i]),
                    "heads_above_twice_stock": self.above_twice(i),
                }
            )
        names = ("n_layers", "samples", "skipped", "checkpoint", "base")
        plain: dict[str, Any] = files.plain(
            {
                "sources": [self.checkpoint, self.base],
                "layers": found,
                **{name: getattr(self, name) for name in names},
                "settings": asdict(self.settings),
            }
        )
        return plain

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FusionAttentionResult":
        """Read what `to_dict` made; what follows from the masses is worked out again."""
        names = ("n_layers", "samples", "skipped", "checkpoint", "base")
        layers, trained, stock = ([one[n] for one in values["layers"]] for n in ("layer", "trained", "stock"))
        settings = FusionAttention(**values["settings"])
        return cls(layers, trained, stock, **{n: values[n] for n in names}, settings=settings)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows: a layer each."""
        rows = []
        for i, layer in enumerate(self.layers):
            a, b = self.trained[i], self.stock[i]
            rows.append(
                [
                    str(layer),
                    f"{_mean(a):.4f}",
                    f"{_mean(b):.4f}",
                    f"{self.mean_ratio(i):.2f}",
                    f"{max(a):.3f} ({_highest(a)})",
                    f"{max(b):.3f} ({_highest(b)})",
                    f"{self.above_twice(i)} of {len(a)}",
                ]
            )
        return ["layer", "mean", "stock", "ratio", "highest (head)", "stock's", "over twice"], rows

    def summary(self) -> str:
        """What was found, in a sentence a layer."""
        lines = []
        for i, layer in enumerate(self.layers):
            a, b = self.trained[i], self.stock[i]
            lines.append(
                f"Layer {layer}: text puts {_mean(a):.4f} of its attention on the image, {_times(self.mean_ratio(i))} "
                f"stock's {_mean(b):.4f}; highest head {max(a):.3f} (head {_highest(a)}), stock's {max(b):.3f} (head "
                f"{_highest(b)}); {self.above_twice(i)} of {len(a)} heads are above twice stock."
            )
        return f"{' '.join(lines)} ({self.samples} samples)"

    def save(self, folder: str | Path, name: str = "fusion_attention") -> tuple[Path, Path]:
        """Write `<name>.json` and `<name>.png` into a folder, each atomically.

        Returns:
            The two paths.
        """
        from llava_patch.measurements.fusion_attention.figure import fusion_attention_figure

        folder = Path(folder)
        json_path = files.write_json(folder / f"{name}.json", self.to_dict())
        return json_path, fusion_attention_figure(self, folder / f"{name}.png")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _times(ratio: float) -> str:
    return "against" if math.isnan(ratio) else f"{ratio:.2f} times"


def _highest(values: list[float]) -> int:
    return values.index(max(values))


def _ratio(one: float, other: float) -> float:
    if other == 0:
        return math.nan if one == 0 else math.inf
    return one / other
