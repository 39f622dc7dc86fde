"""Intervals of what the runs found: 95 %, percentile bootstrap with a fixed seed, so that anyone finds the same."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_patch.core.extras import optional
from llava_patch.tools.evidence.findings import Effect

RESAMPLES = 4000
LEVEL = 95.0


def pack_bits(rows: Tensor) -> str:
    """Right or wrong rows, bool [n], as "n:hexadecimal digits"."""
    return f"{len(rows)}:{np.packbits(rows.cpu().numpy().astype(bool)).tobytes().hex()}"


def unpack_bits(text: str) -> Tensor:
    """What `pack_bits` wrote, bool [n]."""
    count, digits = text.split(":")
    packed = np.frombuffer(bytes.fromhex(digits), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(packed, count=int(count)).astype(bool))


def short(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}")


def share(rows: str) -> float:
    """Share of right rows."""
    return float(unpack_bits(rows).float().mean())


def mean(values: Sequence[float] | np.ndarray) -> Effect:
    """The mean of values of one seed, drawn with replacement."""
    return resampled([np.asarray(values, dtype=float)], lambda one: one.mean(-1))


def proportion(rows: str) -> Effect:
    """Share of right rows, with its interval."""
    return mean(unpack_bits(rows).numpy())


def paired(a: str, b: str, where: Tensor | None = None) -> Effect:
    """Share of right rows in `a` minus that in `b`, on the same rows; `where`, bool [n], picks some of them."""
    one, other = (unpack_bits(rows).numpy().astype(float) for rows in (a, b))
    if len(one) != len(other):
        raise ValueError(f"{len(one)} rows and {len(other)}: they are not the same samples")
    gap = one - other
    return mean(gap if where is None else gap[where.numpy()])


def gains(a: Sequence[Mapping[str, Any]], key: str, b: Sequence[Mapping[str, Any]], other: str) -> tuple[Effect, ...]:
    """`paired` of the rows under `key` in `a` and under `other` in `b`, seed by seed."""
    return tuple(paired(one[key], beside[other]) for one, beside in zip(a, b, strict=True))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> Effect:
    """Spearman's correlation of two figures of the same things, which are drawn with replacement."""
    return resampled([np.asarray(a, dtype=float), np.asarray(b, dtype=float)], spearman)


def resampled(columns: Sequence[np.ndarray], figure: Callable[..., np.ndarray]) -> Effect:
    """A figure of paired columns with its interval.

    Args:
        columns: float [n] each, drawn together.
        figure: of columns [draws, n], gives [draws]; draws in which it is nan (no variation left) are left out.
    """
    rng = np.random.default_rng(0)
    count = len(columns[0])
    value = float(figure(*(column[None] for column in columns))[0])
    found = []
    for _ in range(8):  # in parts, which bounds memory
        drawn = rng.integers(count, size=(RESAMPLES // 8, count))
        found.append(figure(*(column[drawn] for column in columns)))
    edges = np.nanpercentile(np.concatenate(found), [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return Effect(value, float(edges[0]), float(edges[1]))


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation along the last axis; nan where a side has one value only."""
    ranks = [optional("scipy.stats").rankdata(column, axis=-1) for column in (a, b)]
    centred = [rank - rank.mean(-1, keepdims=True) for rank in ranks]
    size = np.sqrt((centred[0] ** 2).sum(-1) * (centred[1] ** 2).sum(-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((centred[0] * centred[1]).sum(-1) / size)
