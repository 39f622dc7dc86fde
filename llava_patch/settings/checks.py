"""Checks that several settings share."""

import math
from collections.abc import Iterable
from typing import Any

from llava_patch.core.errors import SettingError, shown

BROKEN = ("stop", "skip")
"""What happens on a sample that cannot be read."""
LARGEST = 2**63 - 1
"""The largest integer that a setting may be: tensors, and most readers of JSON, hold no larger one."""


def refused(owner: str, name: str, value: Any, expected: str) -> SettingError:
    """The error that says what a setting is and what it should be."""
    return SettingError(f"{owner}.{name} = {shown(value)}: expected {expected}")


def is_integer(value: Any) -> bool:
    """Whether a setting is an integer that 64 bits hold; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def is_number(value: Any) -> bool:
    """Whether a setting is a finite number; True and False are none, nor is an integer that 64 bits do not hold."""
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def is_text(value: Any) -> bool:
    """Whether a setting is a text that can be written to a file: no NUL, no lone surrogate."""
    return isinstance(value, str) and "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def choice(owner: str, name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse what is none of the words."""
    known = tuple(choices)
    if not isinstance(value, str) or value not in known:
        raise refused(owner, name, value, f"one of {', '.join(known)}")


def flag(owner: str, name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise refused(owner, name, value, "True or False")


def integer(owner: str, name: str, value: Any, minimum: int) -> None:
    """Refuse what is not an integer of at least `minimum` and at most `LARGEST`."""
    if not is_integer(value) or value < minimum:
        huge = isinstance(value, int) and value > LARGEST
        raise refused(owner, name, value, f"an integer >= {minimum}{' and below 2**63' if huge else ''}")


def number(owner: str, name: str, value: Any, low: float = -math.inf, *, above: float = -math.inf,
           below: float = math.inf) -> None:  # fmt: skip
    """Refuse what is not a finite number of at least `low`, above `above` and below `below`."""
    if not is_number(value) or not (value >= low and above < value < below):
        limits = [f">= {low:g}"] * (low > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
        limits += [f"below {below:g}"] * (below < math.inf)
        what = "a finite number" if isinstance(value, float) and not math.isfinite(value) else "a number"
        raise refused(owner, name, value, f"{what} {' and '.join(limits)}")


def fraction(owner: str, name: str, value: Any, *, zero: bool = False) -> None:
    """Refuse what is not a number above 0 (or 0, if `zero`) and at most 1."""
    if not is_number(value) or not (value >= 0 if zero else value > 0) or value > 1:
        raise refused(owner, name, value, f"a number {'from' if zero else 'above'} 0 to 1")


def distinct_blocks(
    owner: str, name: str, value: Any, minimum: int, *, empty: bool = False, ordered: bool = False
) -> tuple[int, ...]:
    """A tuple of distinct block numbers, sorted unless their order counts (`ordered`); refuse anything else."""
    if not isinstance(value, (tuple, list)):
        raise refused(owner, name, value, "a tuple of block numbers, as (6, 12)")
    blocks = tuple(value)
    if not blocks and not empty:
        raise SettingError(f"{owner}.{name} = (): no tap left; name at least one block")
    for block in blocks:
        integer(owner, name, block, minimum)
    if len(set(blocks)) != len(blocks):
        raise SettingError(f"{owner}.{name} = {shown(blocks)}: a block is named twice")
    return blocks if ordered else tuple(sorted(blocks))
