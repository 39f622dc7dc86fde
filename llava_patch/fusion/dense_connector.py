"""Dense Connector: features of other blocks beside the main one, as channels (SCI, DCI) or as further tokens (STI)."""

from dataclasses import dataclass

from llava_patch.core.errors import SettingError
from llava_patch.fusion.base import Detach, Fusion, Group, Join, detach_setting, with_detach
from llava_patch.settings.checks import choice, distinct_blocks, integer, refused

CONNECTORS = ("sti", "sci", "dci")


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

    BLOCKS = "groups"

    kind: str = "dci"
    detach: Detach = (0,)
    groups: tuple[int | tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("DenseConnector", "kind", self.kind, CONNECTORS)
        object.__setattr__(self, "detach", detach_setting("DenseConnector", self.detach))
        if self.groups is None:
            return
        if not isinstance(self.groups, (tuple, list)) or not self.groups:
            raise refused("DenseConnector", "groups", self.groups, "blocks or tuples of blocks, as ((0, 1, 2), 15)")
        groups: list[int | tuple[int, ...]] = []
        for group in self.groups:
            if isinstance(group, (tuple, list)):
                groups.append(distinct_blocks("DenseConnector", "groups", group, 0))
            else:
                integer("DenseConnector", "groups", group, 0)
                groups.append(group)
        object.__setattr__(self, "groups", tuple(groups))

    @property
    def join(self) -> Join:
        """STI appends tokens, the others widen the channels."""
        return Join.TOKENS if self.kind == "sti" else Join.CHANNELS

    def choose(self, n_blocks: int, main: int) -> tuple[Group, ...]:
        """The groups of blocks, as published or as given."""
        half = n_blocks // 2
        if self.groups is not None:
            groups = [g if isinstance(g, tuple) else (g,) for g in self.groups]
        elif self.kind == "dci":
            groups = [tuple(range(half)), tuple(range(half, 2 * half))]
        else:
            groups = [(7,), (15,)]
            if n_blocks < 15:
                raise SettingError(
                    f'DenseConnector.kind = "{self.kind}" taps blocks 7 and 15, but this tower has {n_blocks}: name '
                    "others in DenseConnector.groups, as (2, 5)"
                )
        return with_detach("DenseConnector", self.detach, groups)
