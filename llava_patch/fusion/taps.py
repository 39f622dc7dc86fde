"""Which blocks of a tower a fusion taps, and how their features are joined. No tensors here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from llava_patch.core.errors import SettingError
from llava_patch.settings.fusion import DeepStack, DenseConnector, Detach, DirectFusion, Fusion, SkipLinks

STI_POOL = 8
"""How many neighbouring tokens STI averages (Dense Connector, section 3)."""


class Join(Enum):
    """Where tapped features go."""

    CHANNELS = "beside the main feature, on channels"
    TOKENS = "behind the main feature's tokens, averaged over neighbours"
    LAYERS = "through a projector of their own, added to the decoder's image positions"


@dataclass(frozen=True)
class Group:
    """Blocks whose mean is one tap; mostly a single one.

    Attributes:
        blocks: block numbers, 0 being the embedding.
        detached: whether the tap is under stop-gradient.
    """

    blocks: tuple[int, ...]
    detached: bool


@dataclass(frozen=True)
class Taps:
    """A fusion resolved against one tower.

    Attributes:
        main: block of the main feature, 1..N.
        groups: the taps, in the order of their columns (tokens, decoder layers).
        join: where they go.
        merge_size: m x m patches are joined on channels.
        merge_padding: whether a grid that m does not divide is padded.
    """

    main: int
    groups: tuple[Group, ...]
    join: Join = Join.CHANNELS
    merge_size: int = 1
    merge_padding: bool = False

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
    """Resolve a fusion against a tower.

    Args:
        settings: the fusion.
        n_blocks: number N of blocks.
        main: block of the main feature.

    Raises:
        SettingError: a tap outside the tower, no tap left, or a detach setting for taps that are not there.
    """
    join = Join.CHANNELS
    if isinstance(settings, SkipLinks):
        groups = _skip_links(settings, n_blocks, main)
    elif isinstance(settings, DenseConnector):
        groups = _dense_connector(settings, n_blocks)
        join = Join.TOKENS if settings.kind == "sti" else Join.CHANNELS
    elif isinstance(settings, DirectFusion):
        groups = _direct_fusion(settings, n_blocks, main)
    else:
        assert isinstance(settings, DeepStack)
        groups, join = _deep_stack(settings, n_blocks), Join.LAYERS
    return Taps(main, groups, join, settings.merge_size, settings.merge_padding)


def _skip_links(settings: SkipLinks, n_blocks: int, main: int) -> tuple[Group, ...]:
    """Blocks S, 2S, 3S, ... or a list, deepest first: deep before shallow for every D, so columns stay where they are.

    A stride's last block that reaches N is clipped to N-1, one equal to the main block is dropped (section 6.2: S in
    {3, 4, 6, 12}).
    """
    if settings.layers is not None:
        asked = f"SkipLinks.layers = {settings.layers}"
        _check_inside("SkipLinks.layers", settings.layers, n_blocks)
        candidates: Iterable[int] = settings.layers
    else:
        asked = f"SkipLinks.stride = {settings.stride}"
        strided = range(settings.stride, n_blocks + settings.stride, settings.stride)
        candidates = sorted({min(b, n_blocks - 1) for b in strided if b <= n_blocks})
    blocks = [b for b in candidates if b != main and b >= 1]
    if not blocks and settings.layers != ():
        raise SettingError(f"{asked}: no tap left on a tower of {n_blocks} blocks whose main feature is block {main}")
    detached = sum(b <= n_blocks / 2 for b in blocks) if settings.detach is None else settings.detach
    places = _detached("SkipLinks", detached, [(b,) for b in blocks])
    return tuple(Group((b,), i in places) for i, b in reversed(list(enumerate(blocks))))


def _dense_connector(settings: DenseConnector, n_blocks: int) -> tuple[Group, ...]:
    half = n_blocks // 2
    if settings.groups is not None:
        groups = [g if isinstance(g, tuple) else (g,) for g in settings.groups]
    elif settings.kind == "dci":
        groups = [tuple(range(half)), tuple(range(half, 2 * half))]
    else:
        groups = [(7,), (15,)]
        if n_blocks < 15:
            raise SettingError(
                f'DenseConnector.kind = "{settings.kind}" taps blocks 7 and 15, but this tower has {n_blocks}: name '
                "others in DenseConnector.groups, as (2, 5)"
            )
    for group in groups:
        _check_inside("DenseConnector.groups", group, n_blocks)
    return _with_detach("DenseConnector", settings.detach, groups)


def _direct_fusion(settings: DirectFusion, n_blocks: int, main: int) -> tuple[Group, ...]:
    half = n_blocks // 2
    former, latter = tuple(range(1, half + 1)), tuple(range(half + 1, n_blocks + 1))
    named = {"former": [former], "latter": [latter], "all": [former, latter]}
    if isinstance(settings.layers, str) and settings.layers in named:
        groups = named[settings.layers]
    else:
        layers = settings.layers.split("-") if isinstance(settings.layers, str) else settings.layers
        blocks = [int(b) for b in layers]
        _check_inside("DirectFusion.layers", blocks, n_blocks)
        groups = [(b,) for b in blocks if b != main]
        if not groups:
            raise SettingError(f"DirectFusion.layers = {settings.layers!r}: no tap left beside the main block {main}")
    return _with_detach("DirectFusion", settings.detach, groups)


def _deep_stack(settings: DeepStack, n_blocks: int) -> tuple[Group, ...]:
    if settings.taps is None:
        blocks = tuple(sorted({max(1, n_blocks // 4), n_blocks // 2, 3 * n_blocks // 4, n_blocks - 1} - {0}))
    else:
        blocks = settings.taps
        _check_inside("DeepStack.taps", blocks, n_blocks)
    return _with_detach("DeepStack", settings.detach, [(b,) for b in blocks])


def injection_layers(settings: Fusion | None, taps: Taps | None) -> tuple[int, ...]:
    """Decoder layers whose input takes a tap, in the order of the taps; () unless the fusion is DeepStack."""
    if not isinstance(settings, DeepStack) or taps is None:
        return ()
    return tuple(settings.start + i * settings.interval for i in range(len(taps.groups)))


def _check_inside(setting: str, blocks: Iterable[int], n_blocks: int) -> None:
    outside = [b for b in blocks if b > n_blocks]
    if outside:
        raise SettingError(f"{setting}: block {outside[0]} is outside this tower's 1..{n_blocks}")


def _with_detach(owner: str, detach: Detach, groups: list[tuple[int, ...]]) -> tuple[Group, ...]:
    places = _detached(owner, detach, groups)
    return tuple(Group(group, i in places) for i, group in enumerate(groups))


def _detached(owner: str, detach: Detach, groups: list[tuple[int, ...]]) -> set[int]:
    """Places of the detached groups: a number means that many of the shallowest."""
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
