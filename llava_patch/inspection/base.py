"""Whether the model below a checkpoint is the one that it was made on."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from llava_patch.convert import names
from llava_patch.convert.weights import read_json
from llava_patch.errors import CheckpointError
from llava_patch.hosts.anatomy import LLAVA
from llava_patch.inspection.headers import Tensor, read_headers, sample, weight_files

_VALUES = 4


@dataclass(frozen=True)
class Match:
    """How a base compares.

    Attributes:
        same: whether it is the right one; None: cannot be told.
        compared: matrices that were compared, by a few values each.
        differing: how many of them differ.
        note: one sentence.
    """

    same: bool | None
    compared: int
    differing: int
    note: str


def match_base(
    base: str, host: str, fingerprint: dict[str, list[float]] | None, own: list[Tensor], asked: bool
) -> Match:
    """Compare a base with an adapter's record, or, for a full checkpoint, with the checkpoint's own tensors.

    Args:
        base: folder of the base.
        host: of the checkpoint.
        fingerprint: the record's sampled values; None for a full checkpoint.
        own: a full checkpoint's tensors.
        asked: whether the user named the base: it must then be there.

    Raises:
        CheckpointError: the named base is not there, or holds no weights.
    """
    if not os.path.isdir(base):
        if asked:
            raise CheckpointError(f"--base {base}: no such folder")
        lost = "not there any more" if os.path.isabs(base) else "a name of the hub, which is not looked up"
        return Match(None, 0, 0, f"{base} is {lost}; name a folder with --base to compare")
    files = weight_files(base)
    if not files:
        raise CheckpointError(f"--base {base}: holds no weights")
    below = {names.neutral(t.name, host) or t.name: t for t in read_headers(files)}
    if fingerprint is None:
        return _against_own(below, host, own)
    tower = _tower(base) if host == LLAVA else {}  # llava's lies in a folder of its own
    below |= tower
    differing, lacking = [], []
    away = 0
    for name, values in fingerprint.items():
        plain = names.neutral(name, host) or name
        there = below.get(plain)
        if there is None and not tower and host == LLAVA and plain.startswith("tower."):
            away += 1
        elif there is None:
            lacking.append(name)
        elif not _close(sample(there, len(values)), values):
            differing.append(name)
    compared = len(fingerprint) - len(lacking) - away
    if differing:
        return Match(False, compared, len(differing), f"another base: {differing[0]} differs")
    if lacking:
        return Match(False, compared, 0, f"another base: it has no tensor {lacking[0]}")
    note = f"the base it was made on ({compared} matrices compared at {_VALUES} places)"
    return Match(True, compared, 0, note + (f"; its vision tower is elsewhere ({away} not compared)" if away else ""))


def _against_own(below: dict[str, Tensor], host: str, own: list[Tensor]) -> Match:
    """A full checkpoint records no base: what was frozen equals the base's, what was trained does not."""
    differing, compared = [], 0
    for tensor in own:
        there = below.get(names.neutral(tensor.name, host) or tensor.name)
        if there is None or there.shape != tensor.shape or len(tensor.shape) != 2:
            continue
        compared += 1
        if not _close(sample(there, _VALUES), sample(tensor, _VALUES)):
            differing.append(tensor.name)
    if not compared:
        return Match(False, 0, 0, "another base: no matrix in common")
    equal = compared - len(differing)
    note = f"a full checkpoint records no base; {equal} of {compared} matrices equal this one's at {_VALUES} places"
    return Match(True if not differing else None, compared, len(differing), note)


def _tower(base: str) -> dict[str, Tensor]:
    place = (read_json(base, "config.json") or {}).get("mm_vision_tower", "")
    if not os.path.isdir(place):
        return {}
    return {f"tower.{t.name}": t for t in read_headers(weight_files(place))}


def _close(one: list[float], other: list[float]) -> bool:
    # Two roundings to bfloat16 (8 bits of mantissa) are the same base; training moves values further.
    return all(math.isclose(a, b, rel_tol=2**-7, abs_tol=1e-6) for a, b in zip(one, other, strict=True))
