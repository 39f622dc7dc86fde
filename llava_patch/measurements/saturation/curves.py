"""Per-layer values of a sample, and their running mean over samples."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Curves:
    """Per-layer values of one sample, or the mean over samples; index = layer number.

    Attributes:
        image_cosine: cosine between a layer's input and output, mean over image positions; NaN where absent.
        text_cosine: the same over text positions (everything that is not image).
        head_mass: [layers][heads], attention probability that text behind the image puts on image keys.
        image_kl: KL(final || layer) of the logit lens in nats, mean over image positions; NaN where absent.
        text_kl: the same over text positions.
        image_states: number of image positions that have hidden states in a layer.
        image_keys: number of image positions that a layer's queries can look at; in the KV variant's deep layers there
            are keys without states, and pruned layers have the ones that are kept.
    """

    image_cosine: list[float]
    text_cosine: list[float]
    head_mass: list[list[float]]
    image_kl: list[float]
    text_kl: list[float]
    image_states: list[float]
    image_keys: list[float]

    @property
    def mass(self) -> list[float]:
        """Attention mass per layer, mean over heads."""
        return [sum(heads) / len(heads) for heads in self.head_mass]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Curves":
        """Read curves from JSON values, where null is NaN; KeyError, TypeError or ValueError when they are damaged."""
        curves = cls(**{f.name: _with_nan(values[f.name]) for f in fields(cls)})
        lengths = {len(curve) for curve in vars(curves).values()}
        if len(lengths) != 1 or 0 in lengths or not all(curves.head_mass):
            raise ValueError(f"curves over {sorted(lengths)} layers")
        return curves

    @property
    def image_present(self) -> list[bool]:
        """Whether each layer has hidden states of image positions."""
        return [not math.isnan(value) for value in self.image_cosine]


@dataclass(frozen=True)
class RunningMean:
    """Sums over samples, each of which counts the same: memory does not grow with their number.

    Never changed in place, so that a signal between two samples cannot leave one counted in half.

    Attributes:
        samples: number of samples added.
        skipped: number of samples left out, by reason.
        sums: float64 [layers] or [layers, heads], by the curve's name; NaN (absent positions) does not count.
        counts: int64 of the same shapes, how many values each sum has.
    """

    samples: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def seen(self) -> int:
        """Number of samples looked at, those left out included."""
        return self.samples + sum(self.skipped.values())

    def plus(self, curves: Curves) -> "RunningMean":
        """With one more sample."""
        sums, counts = {}, {}
        for name, values in asdict(curves).items():
            new = torch.tensor(values, dtype=torch.float64)
            known = ~new.isnan()
            sums[name] = self.sums.get(name, 0) + torch.where(known, new, 0.0)
            counts[name] = self.counts.get(name, 0) + known.long()
        return replace(self, samples=self.samples + 1, sums=sums, counts=counts)

    def without(self, reason: str) -> "RunningMean":
        """With one more sample that was left out."""
        return replace(self, skipped={**self.skipped, reason: self.skipped.get(reason, 0) + 1})

    def mean(self) -> Curves:
        """Mean of what was added; 0 / 0 is NaN, which stands for absent."""
        return Curves(**{name: (self.sums[name] / self.counts[name]).tolist() for name in self.sums})


def _with_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else float(value)
