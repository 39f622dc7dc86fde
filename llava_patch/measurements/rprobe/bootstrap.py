"""Bootstrap 95 % intervals of held-out figures, with documents as the unit that is drawn.

Regions of one document share font, paper and image, so they are not independent: whole documents are drawn with
replacement. Percentile intervals: BCa would correct for skew, but it fails (nan) where documents are few or alike,
which is where a probe is often read. With few documents (under about 20) they are somewhat too narrow.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llava_patch.core.errors import InputError
from llava_patch.core.extras import optional

LEVEL = 0.95
FEW = "no interval: it is drawn over documents, and there are fewer than 2"
DRAWN_AT_ONCE = 4_000_000  # numbers drawn at a time, which bounds memory at some 100 MB whatever the documents

Samples = Sequence[Mapping[str, Any]]


def interval(
    documents: Samples, resamples: int, seed: int, value: str = "mse", relative_to: str | None = None
) -> tuple[float, float] | None:
    """(low, high), a percentile 95 % interval of a mean over tokens: sum(value x tokens) / sum(tokens).

    `documents` are those of `RProbeResult`; `relative_to` divides by the mean of that figure, drawn together with the
    value, instead of by 1: "variance" gives FVU. None where there are fewer than 2 documents (`FEW` says so in words).
    """
    owner, weights = _owners(documents), _numbers(documents, "tokens")
    below = weights if relative_to is None else _numbers(documents, relative_to) * weights
    return _bootstrap(owner, _numbers(documents, value) * weights, below, resamples, seed)


def paired(a: Samples, b: Samples, resamples: int, seed: int) -> tuple[float, float | None, float | None]:
    """(MSE(a) - MSE(b), low, high) of two results on the same held-out samples, matched by id, with its 95 % interval.

    Both are taken from the same drawn documents, so what makes a document hard for both cancels out. `low` and `high`
    are None where there are fewer than 2 documents; an InputError names what differs where they are not the same
    samples.
    """
    if (difference := unlike(a, b)) is not None:
        raise InputError(f"no paired difference: {difference}")
    twins = {str(sample["id"]): sample for sample in b}
    b = [twins[str(sample["id"])] for sample in a]
    owner, tokens = _owners(a), _numbers(a, "tokens")
    gap = (_numbers(a, "mse") - _numbers(b, "mse")) * tokens
    found = _bootstrap(owner, gap, tokens, resamples, seed)
    value = float(np.bincount(owner, weights=gap).sum() / np.bincount(owner, weights=tokens).sum())
    return (value, None, None) if found is None else (value, *found)


def unlike(a: Samples, b: Samples, names: tuple[str, str] = ("the first result", "the second result")) -> str | None:
    """What keeps two results (called `names`) from being of the same held-out samples, in words; None: nothing."""
    by_id: list[dict[str, Mapping[str, Any]]] = [{}, {}]
    for found, samples in zip(by_id, (a, b), strict=True):
        for sample in samples:
            if (name := str(sample["id"])) in found:
                return f"sample {name!r} is there twice, so samples cannot be matched by id"
            found[name] = sample
    only = []
    for own, other, which in zip(by_id, by_id[::-1], names, strict=True):
        if alone := [name for name in own if name not in other]:
            only.append(f"{len(alone)} of {len(own)} held-out samples are only in {which} (such as {alone[0]!r})")
    if only:
        return ", ".join(only)
    for name, sample in by_id[0].items():
        twin = by_id[1][name]
        for key, what in (("tokens", "target tokens"), ("document", "document"), ("text", "text")):
            if sample.get(key) != twin.get(key):
                return (
                    f"sample {sample['id']!r} has {what} {sample.get(key)!r} in one and {twin.get(key)!r} in the other"
                )
    return None


def _owners(documents: Samples) -> np.ndarray:
    """Number of each sample's document, int64 [samples]."""
    if not documents:
        raise InputError("no held-out sample to draw from")
    return np.unique([str(sample["document"]) for sample in documents], return_inverse=True)[1].reshape(-1)


def _numbers(documents: Samples, key: str) -> np.ndarray:
    """One figure of every sample, float64 [samples]."""
    try:
        return np.array([float(sample[key]) for sample in documents])
    except (KeyError, TypeError) as error:
        raise InputError(f"a held-out sample has no number {key!r}") from error


def _bootstrap(
    owner: np.ndarray, above: np.ndarray, below: np.ndarray, resamples: int, seed: int
) -> tuple[float, float] | None:
    """Interval of sum(above) / sum(below), both float64 [samples], over draws of whole documents."""
    data = [np.bincount(owner, weights=values) for values in (above, below)]
    count = len(data[0])
    if count < 2:
        return None
    how: dict[str, Any] = {"paired": True, "vectorized": True, "method": "percentile", "confidence_level": LEVEL}
    how |= {"n_resamples": resamples, "batch": max(1, min(resamples, DRAWN_AT_ONCE // count))}
    ratio = optional("scipy.stats").bootstrap(
        data, lambda a, b, axis: a.sum(axis) / b.sum(axis), random_state=np.random.default_rng(seed), **how
    )
    return float(ratio.confidence_interval.low), float(ratio.confidence_interval.high)
