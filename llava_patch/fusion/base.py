"""What every fusion has: shared settings, the question that it answers (which blocks it taps), and the answer's form.

Blocks are counted from 1: block i is the output of the vision tower's i-th block, 0 is the embedding. A fusion is one
dataclass in one file of this folder; nothing here imports torch, so that `import llava_patch` stays cheap.
"""

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Literal, Union

from llava_patch.core.errors import SettingError, shown
from llava_patch.settings.checks import flag, fraction, integer, is_integer, number, refused

TrainTower = Union[Literal["frozen", "all"], int]
Detach = Union[int, tuple[int, ...]]
STI_POOL = 8
"""How many neighbouring tokens STI averages (Dense Connector, section 3)."""


class Join(Enum):
    """Where tapped features go."""

    CHANNELS = "beside the main feature, on channels"
    TOKENS = "behind the main feature's tokens, averaged over neighbours"
    LAYERS = "through a projector, added to the decoder's image positions"


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


@dataclass(frozen=True, kw_only=True, repr=False)
class Fusion:
    """What every fusion has.

    Attributes:
        merge_size: join m x m neighbouring patches on channels before the projector (the paper's 448-pixel models have
            2: 256 tokens of 32 x 32 patches); 1 is LLaVA-1.5's behaviour.
        merge_padding: pad a patch grid that merge_size does not divide with zeros, at the right and below; without it
            such a grid is an error.
        train_tower: what trains in the vision tower: "frozen", "all" (the embeddings and every block that is used), or
            the last k blocks that are used.
        tower_lr: learning rate of the vision tower; None: that of the rest of the model (never --mm_projector_lr).
        layer_decay: each block's learning rate is that of the block above it times this, the embeddings' that of block
            1 times this; the last used block has the tower's own. None: all the same.
        unfreeze_after: share of the run's optimizer steps (rounded up) in which only the projector, and what else the
            fusion adds, learns; then everything that the script trains joins in, with a fresh Adam state. A resumed run
            goes on in its phase. Backward passes cost as much as later: what waits gets zeros. None or 0: from the
            beginning. In a loop of your own: `Handle.warm_up`.

    What trains may change from one run to the next, on a finished checkpoint too; the other settings may not.
    """

    KIND: ClassVar[str] = "fusion"
    BLOCKS: ClassVar[str] = ""  # the setting that names the tapped blocks, for errors; "": they follow from several

    merge_size: int = 1
    merge_padding: bool = False
    train_tower: TrainTower = "frozen"
    tower_lr: float | None = None
    layer_decay: float | None = None
    unfreeze_after: float | None = None

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if not is_integer(self.merge_size) or self.merge_size not in (1, 2):
            raise refused(owner, "merge_size", self.merge_size, "1 (LLaVA-1.5) or 2")
        flag(owner, "merge_padding", self.merge_padding)
        train = self.train_tower
        if not (train in ("frozen", "all") if isinstance(train, str) else is_integer(train) and train >= 1):
            raise refused(owner, "train_tower", train, '"frozen", "all" or k >= 1 (train the last k used blocks)')
        if self.tower_lr is not None:
            number(owner, "tower_lr", self.tower_lr, above=0)
        if self.layer_decay is not None:
            fraction(owner, "layer_decay", self.layer_decay)
        if self.merge_padding and self.merge_size == 1:
            raise SettingError(f"{owner}.merge_padding = True pads for merge_size = 2, but merge_size is 1")
        if self.unfreeze_after is not None:
            fraction(owner, "unfreeze_after", self.unfreeze_after, zero=True)
            if self.unfreeze_after == 1:
                raise SettingError(f"{owner}.unfreeze_after = 1: nothing but the projector would ever learn")
        if self.train_tower == "frozen":
            for name in ("tower_lr", "layer_decay"):
                if getattr(self, name) is not None:
                    raise SettingError(
                        f'{owner}.{name} = {getattr(self, name)!r}, but {owner}.train_tower = "frozen": nothing in the '
                        'tower trains; set train_tower = "all" or a number of blocks'
                    )

    def __repr__(self) -> str:
        """The method's own settings, and of those that every fusion has what was changed."""
        shared = {f.name: f.default for f in dataclasses.fields(Fusion)}
        own = [f.name for f in dataclasses.fields(self) if f.name not in shared]
        changed = [name for name, default in shared.items() if getattr(self, name) != default]
        return f"{type(self).__name__}({', '.join(f'{n}={getattr(self, n)!r}' for n in own + changed)})"

    @property
    def join(self) -> Join:
        """Where the tapped features go."""
        return Join.CHANNELS

    def choose(self, n_blocks: int, main: int) -> tuple[Group, ...]:
        """The fusion's definition: which blocks of a tower it taps, in the order of their columns (tokens, layers).

        The tower has N blocks, of which `main`, 1..N, gives the main feature. SettingError: a tap outside the tower, no
        tap left, or a detach setting for taps that are not there.
        """
        raise NotImplementedError

    @property
    def shares_projector(self) -> bool:
        """With `Join.LAYERS`, whether the taps go through the model's own projector, so that nothing is added."""
        return False

    @property
    def needs_tap(self) -> bool:
        """Whether the fusion has no meaning without a tap."""
        return True

    def decoder_layers(self, n_taps: int) -> tuple[int, ...]:
        """With `Join.LAYERS`, the decoder layer, from 0, whose input takes each tap."""
        return ()


TRAINING = ("train_tower", "tower_lr", "layer_decay", "unfreeze_after")
"""Fields of `Fusion` that change no output."""


def differs(one: Fusion | None, other: Fusion | None, ignoring: tuple[str, ...] = TRAINING) -> bool:
    """Whether two fusions differ in more than some fields; by default in more than what trains."""
    if one is None or other is None or type(one) is not type(other):
        return one is not other
    return dataclasses.replace(one, **{name: getattr(other, name) for name in ignoring}) != other


def detach_setting(owner: str, value: Any) -> Detach:
    """A valid `detach`: a number of taps, or the places of some, sorted."""
    if not isinstance(value, (tuple, list)):
        integer(owner, "detach", value, 0)
        return int(value)
    for place in value:
        integer(owner, "detach", place, 0)
    if len(set(value)) != len(value):
        raise SettingError(f"{owner}.detach = {shown(tuple(value))}: a tap is named twice")
    return tuple(sorted(value))


def choose_taps(settings: Fusion, n_blocks: int, main: int) -> Taps:
    """Resolve a fusion against a tower of N blocks; which blocks it taps is said by its own `choose`."""
    groups = settings.choose(n_blocks, main)
    if not groups and settings.needs_tap:
        raise SettingError(
            f"{settings}: no tap left on a tower of {n_blocks} blocks whose main feature is block {main}"
        )
    if outside := [block for group in groups for block in group.blocks if block > n_blocks]:
        setting = f"{type(settings).__name__}.{settings.BLOCKS}" if settings.BLOCKS else str(settings)
        raise SettingError(f"{setting}: block {outside[0]} is outside this tower's 1..{n_blocks}")
    layers = settings.decoder_layers(len(groups))
    return Taps(main, groups, settings.join, settings.merge_size, settings.merge_padding, layers)


def with_detach(owner: str, detach: Detach, groups: list[tuple[int, ...]]) -> tuple[Group, ...]:
    """Taps of these groups of blocks, those that `detach` names under stop-gradient; a number: that many shallowest.

    SettingError: more taps, or places, than there are; names the setting `owner`.detach.
    """
    there = ", ".join(str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups) or "none"
    if isinstance(detach, int):
        if detach > len(groups):
            raise SettingError(f"{owner}.detach = {detach}: there are only {len(groups)} taps (blocks {there})")
        detach = tuple(sorted(range(len(groups)), key=lambda i: (max(groups[i]), i))[:detach])
    wrong = [place for place in detach if place >= len(groups)]
    if wrong:
        raise SettingError(
            f"{owner}.detach = {detach}: place {wrong[0]} is outside 0..{len(groups) - 1} of the taps (blocks {there})"
        )
    return tuple(Group(group, i in detach) for i, group in enumerate(groups))
