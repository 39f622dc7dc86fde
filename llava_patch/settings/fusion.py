"""Settings of multi-layer vision fusions, each with a detach option over its own taps.

Blocks are counted from 1: block i is the output of the vision tower's i-th block, 0 is the embedding.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Union

from llava_patch.core.errors import SettingError
from llava_patch.settings.checks import distinct_blocks, fraction, integer

TrainTower = Union[Literal["frozen", "all"], int]
Detach = Union[int, tuple[int, ...]]
CONNECTORS = ("sti", "sci", "dci")
NAMED_LAYERS = ("18", "3-18", "3-18-23", "former", "latter", "all")


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

    merge_size: int = 1
    merge_padding: bool = False
    train_tower: TrainTower = "frozen"
    tower_lr: float | None = None
    layer_decay: float | None = None
    unfreeze_after: float | None = None

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if self.merge_size not in (1, 2) or isinstance(self.merge_size, bool):
            raise SettingError(f"{owner}.merge_size = {self.merge_size!r}: expected 1 (LLaVA-1.5) or 2")
        if not isinstance(self.merge_padding, bool):
            raise SettingError(f"{owner}.merge_padding = {self.merge_padding!r}: expected True or False")
        _train_tower(owner, self.train_tower)
        if self.tower_lr is not None:
            number = isinstance(self.tower_lr, (int, float)) and not isinstance(self.tower_lr, bool)
            if not number or not 0 < self.tower_lr < math.inf:
                raise SettingError(f"{owner}.tower_lr = {self.tower_lr!r}: expected a number above 0")
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


TRAINING = ("train_tower", "tower_lr", "layer_decay", "unfreeze_after")
"""Fields of `Fusion` that change no output."""


def differs(one: Fusion | None, other: Fusion | None, ignoring: tuple[str, ...] = TRAINING) -> bool:
    """Whether two fusions differ in more than some fields; by default in more than what trains."""
    if one is None or other is None or type(one) is not type(other):
        return one is not other
    return dataclasses.replace(one, **{name: getattr(other, name) for name in ignoring}) != other


def _train_tower(owner: str, value: Any) -> None:
    if value in ("frozen", "all"):
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingError(
            f'{owner}.train_tower = {value!r}: expected "frozen", "all" or k >= 1 (train the last k used blocks)'
        )


def _detach(owner: str, value: Any) -> Detach:
    if not isinstance(value, (tuple, list)):
        integer(owner, "detach", value, 0)
        return int(value)
    for place in value:
        integer(owner, "detach", place, 0)
    if len(set(value)) != len(value):
        raise SettingError(f"{owner}.detach = {tuple(value)}: a tap is named twice")
    return tuple(sorted(value))


@dataclass(frozen=True, repr=False)
class SkipLinks(Fusion):
    """Detached Skip-Links: shallow ViT blocks feed the projector, without gradient through the shallow taps.

    Source: "Detached Skip-Links and R-Probe", section 3, eq. 1.

    Attributes:
        stride: take blocks S, 2S, 3S, ... of the vision tower as taps (ignored when `layers` is given).
        detach: how many of the shallowest taps are under stop-gradient; None: those in the lower half of the tower.
        layers: explicit tap blocks (1 = output of the first block) instead of a stride. () is the baseline without
            taps, for a model that merges patches or trains its tower.
    """

    stride: int = 6
    detach: int | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("SkipLinks", "stride", self.stride, 1)
        if self.detach is not None:
            integer("SkipLinks", "detach", self.detach, 0)
        if self.layers is not None:
            layers = distinct_blocks(
                "SkipLinks", "layers", self.layers, 1, empty=self.merge_size > 1 or self.train_tower != "frozen"
            )
            object.__setattr__(self, "layers", layers)


@dataclass(frozen=True, repr=False)
class DenseConnector(Fusion):
    """Dense Connector: features of other blocks beside the main one, as channels or as further tokens.

    Source: "Dense Connector for MLLMs" (Yao et al., 2024), section 3. Block 0 is the embedding.

    Attributes:
        kind: "sti": blocks 7 and 15, averaged over 8 neighbouring tokens, are appended as tokens. "sci": blocks 7 and
            15 on channels. "dci": the means of two groups on channels: of hidden states 0..11 and 12..23 (the
            published code; on a tower of N blocks the first 2 * (N // 2) states, in halves).
        detach: groups under stop-gradient: a number (that many shallowest), or places in `groups`, from 0. The
            Skip-Links paper detaches the first (section 6.4).
        groups: other groups, each a block or a tuple of blocks to average. None: as above.
    """

    kind: str = "dci"
    detach: Detach = (0,)
    groups: tuple[int | tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in CONNECTORS:
            raise SettingError(f"DenseConnector.kind = {self.kind!r}: expected one of {', '.join(CONNECTORS)}")
        object.__setattr__(self, "detach", _detach("DenseConnector", self.detach))
        if self.groups is None:
            return
        if not isinstance(self.groups, (tuple, list)) or not self.groups:
            raise SettingError(
                f"DenseConnector.groups = {self.groups!r}: expected blocks or tuples of blocks, as ((0, 1, 2), 15)"
            )
        groups: list[int | tuple[int, ...]] = []
        for group in self.groups:
            if isinstance(group, (tuple, list)):
                groups.append(distinct_blocks("DenseConnector", "groups", group, 0))
            else:
                integer("DenseConnector", "groups", group, 0)
                groups.append(group)
        object.__setattr__(self, "groups", tuple(groups))


@dataclass(frozen=True, repr=False)
class DirectFusion(Fusion):
    """External direct fusion (ML): features of other blocks on channels beside the main one.

    Source: "Multi-Layer Visual Feature Fusion in Multimodal LLMs" (Lin et al., 2025), external direct fusion.

    Attributes:
        layers: "18", "3-18" or "3-18-23" (these blocks; the main one is there anyway), "former" (mean of the lower
            half of the blocks), "latter" (mean of the upper half), "all" (both means), or a tuple of blocks, which
            keeps its order.
        detach: taps under stop-gradient: a number (that many shallowest), or places in the set, from 0. The Skip-Links
            paper detaches the set's last layer (section 6.4), which is (1,) for "3-18"; the default detaches nothing.
    """

    layers: str | tuple[int, ...] = "3-18"
    detach: Detach = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "detach", _detach("DirectFusion", self.detach))
        if isinstance(self.layers, str):
            if self.layers not in NAMED_LAYERS:
                raise SettingError(
                    f"DirectFusion.layers = {self.layers!r}: expected one of {', '.join(NAMED_LAYERS)}, or a tuple of "
                    "blocks, as (3, 18)"
                )
            return
        object.__setattr__(self, "layers", distinct_blocks("DirectFusion", "layers", self.layers, 1, ordered=True))


@dataclass(frozen=True, repr=False)
class DeepStack(Fusion):
    """DeepStack: projected features of other blocks are added to the image positions at several decoder layers.

    Source: "DeepStack" (Meng et al., 2024); with blocks of one tower as in the Skip-Links paper, section 6.4. The taps
    go through one projector of their own; the first is added to the input of layer `start`.

    Attributes:
        taps: blocks, in the order of the decoder layers; None: at N/4, N/2, 3N/4 and N-1 of a tower of N blocks
            (6, 12, 18, 23).
        start: decoder layer, from 0, that takes the first tap.
        interval: decoder layers from one tap to the next.
        detach: taps under stop-gradient: a number (that many shallowest), or places in `taps`, from 0.
    """

    taps: tuple[int, ...] | None = None
    start: int = 4
    interval: int = 2
    detach: Detach = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("DeepStack", "start", self.start, 0)
        integer("DeepStack", "interval", self.interval, 1)
        object.__setattr__(self, "detach", _detach("DeepStack", self.detach))
        if self.taps is not None:
            object.__setattr__(self, "taps", distinct_blocks("DeepStack", "taps", self.taps, 1, ordered=True))
