"""Which blocks of a tower a fusion taps, and how their features are joined. No tensors here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from llava_patch.core.errors import SettingError

if TYPE_CHECKING:
    from llava_patch.fusion.base import Fusion

STI_POOL = 8
"""How many neighbouring tokens STI averages (Dense Connector, section 3)."""


class Join(Enum):
    """Where tapped features go."""

    CHANNELS = "beside the main feature, on channels"
    TOKENS = "behind the main feature's tokens, averaged over neighbours"
    LAYERS = "through a projector of their own, added to the decoder's image positions"


@dataclass(frozen=True)
class Group:
    """Blocks whose mean is one tap; mostly a single one."""

    blocks: tuple[int, ...]  # block numbers, 0 being the embedding
    detached: bool  # whether the tap is under stop-gradient


@dataclass(frozen=True)
class Taps:
    """A fusion resolved against one tower."""

    main: int  # block of the main feature, 1..N
    groups: tuple[Group, ...]  # the taps, in the order of their columns (tokens, decoder layers)
    join: Join = Join.CHANNELS  # where they go
    merge_size: int = 1  # m x m patches are joined on channels
    merge_padding: bool = False  # whether a grid that m does not divide is padded
    layers: tuple[int, ...] = ()  # decoder layers whose input takes each tap; () unless the taps go there

    @property
    def blocks(self) -> tuple[int, ...]:
        """All tapped blocks, the shallowest first."""
        return tuple(sorted({block for group in self.groups for block in group.blocks}))

    @property
    def detached(self) -> int:
        """How many taps are under stop-gradient."""
        return sum(group.detached for group in self.groups)

    @property
    def deepest(self) -> int:
        """The deepest block whose output carries a gradient: the main one, or a tap that is not detached."""
        return max([self.main, *(block for group in self.groups if not group.detached for block in group.blocks)])

    @property
    def columns(self) -> int:
        """How many features stand beside one another on channels."""
        return 1 + (len(self.groups) if self.join is Join.CHANNELS else 0)

    @property
    def keeps_tokens(self) -> bool:
        """Whether an image has as many tokens as in the stock model."""
        return self.join is not Join.TOKENS and self.merge_size == 1

    def main_tokens(self, grid: tuple[int, int]) -> int:
        """Tokens of the main feature, without a CLS token."""
        return -(-grid[0] // self.merge_size) * -(-grid[1] // self.merge_size)

    def tokens(self, grid: tuple[int, int]) -> int:
        """Tokens of an image (without a CLS token) whose patches form a grid of (rows, columns)."""
        own = self.main_tokens(grid)
        return own + (len(self.groups) * (own // STI_POOL) if self.join is Join.TOKENS else 0)


def choose_taps(settings: Fusion, n_blocks: int, main: int) -> Taps:
    """Resolve a fusion against a tower of N blocks; which blocks it taps is said by its own `choose`."""
    groups = settings.choose(n_blocks, main)
    if not groups and settings.needs_tap:
        raise SettingError(
            f"{settings}: no tap left on a tower of {n_blocks} blocks whose main feature is block {main}"
        )
    check_inside(str(settings), (block for group in groups for block in group.blocks), n_blocks)
    layers = settings.decoder_layers(len(groups))
    return Taps(main, groups, settings.join, settings.merge_size, settings.merge_padding, layers)


def check_inside(setting: str, blocks: Iterable[int], n_blocks: int) -> None:
    """Refuse blocks that the tower does not have, naming the setting."""
    outside = [b for b in blocks if b > n_blocks]
    if outside:
        raise SettingError(f"{setting}: block {outside[0]} is outside this tower's 1..{n_blocks}")


def with_detach(owner: str, detach: int | tuple[int, ...], groups: list[tuple[int, ...]]) -> tuple[Group, ...]:
    """Taps of these groups of blocks, those that `detach` names under stop-gradient; see `detached_places`."""
    places = detached_places(owner, detach, groups)
    return tuple(Group(group, i in places) for i, group in enumerate(groups))


def detached_places(owner: str, detach: int | tuple[int, ...], groups: list[tuple[int, ...]]) -> set[int]:
    """Places of the detached groups: a number means that many of the shallowest.

    SettingError: more taps, or places, than there are; names the setting `owner`.detach.
    """
    there = ", ".join(str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups) or "none"
    if isinstance(detach, int):
        if detach > len(groups):
            raise SettingError(f"{owner}.detach = {detach}: there are only {len(groups)} taps (blocks {there})")
        return set(sorted(range(len(groups)), key=lambda i: (max(groups[i]), i))[:detach])
    wrong = [place for place in detach if place >= len(groups)]
    if wrong:
        raise SettingError(
            f"{owner}.detach = {detach}: place {wrong[0]} is outside 0..{len(groups) - 1} of the taps (blocks {there})"
        )
    return set(detach)
