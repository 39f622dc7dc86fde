"""Checks that several settings share."""

from collections.abc import Iterable
from typing import Any

from llava_patch.core.errors import SettingError

BROKEN = ("stop", "skip")
"""What happens on a sample that cannot be read."""


def is_number(value: Any) -> bool:
    """Whether a setting is a number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def choice(owner: str, name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse what is none of the words."""
    if value not in (known := tuple(choices)):
        raise SettingError(f"{owner}.{name} = {value!r}: expected one of {', '.join(known)}")


def integer(owner: str, name: str, value: Any, minimum: int) -> None:
    """Refuse what is not an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise SettingError(f"{owner}.{name} = {value!r}: expected an integer >= {minimum}")


def fraction(owner: str, name: str, value: Any, *, zero: bool = False) -> None:
    """Refuse what is not a number above 0 (or 0, if `zero`) and at most 1."""
    if not is_number(value) or not (value >= 0 if zero else value > 0) or value > 1:
        raise SettingError(f"{owner}.{name} = {value!r}: expected a number {'from' if zero else 'above'} 0 to 1")


def distinct_blocks(
    owner: str, name: str, value: Any, minimum: int, *, empty: bool = False, ordered: bool = False
) -> tuple[int, ...]:
    """A tuple of distinct block numbers, sorted unless their order counts (`ordered`); refuse anything else."""
    if not isinstance(value, (tuple, list)):
        raise SettingError(f"{owner}.{name} = {value!r}: expected a tuple of block numbers, as (6, 12)")
    blocks = tuple(value)
    if not blocks and not empty:
        raise SettingError(f"{owner}.{name} = (): no tap left; name at least one block")
    for block in blocks:
        integer(owner, name, block, minimum)
    if len(set(blocks)) != len(blocks):
        raise SettingError(f"{owner}.{name} = {blocks}: a block is named twice")
    return blocks if ordered else tuple(sorted(blocks))
