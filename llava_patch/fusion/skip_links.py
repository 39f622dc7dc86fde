"""Detached Skip-Links: shallow blocks beside the main feature, under stop-gradient."""

from dataclasses import dataclass

from llava_patch.core.errors import SettingError
from llava_patch.fusion.base import Fusion, Group, with_detach
from llava_patch.settings.checks import distinct_blocks, integer


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

    BLOCKS = "layers"

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

    @property
    def needs_tap(self) -> bool:
        """Not where `layers` says that there is none."""
        return self.layers != ()

    def choose(self, n_blocks: int, main: int) -> tuple[Group, ...]:
        """Blocks S, 2S, 3S, ... or a list, the deepest first, so that columns stay where they are for every D.

        A stride's last block that reaches N is clipped to N-1, one equal to the main block is dropped (section 6.2: S
        in {3, 4, 6, 12}).
        """
        if self.layers is not None:
            asked = f"SkipLinks.layers = {self.layers}"
            candidates = list(self.layers)
        else:
            asked = f"SkipLinks.stride = {self.stride}"
            strided = range(self.stride, n_blocks + self.stride, self.stride)
            candidates = sorted({min(b, n_blocks - 1) for b in strided if b <= n_blocks})
        blocks = [b for b in candidates if b != main and b >= 1]
        if not blocks and self.needs_tap:
            raise SettingError(
                f"{asked}: no tap left on a tower of {n_blocks} blocks whose main feature is block {main}"
            )
        detached = sum(b <= n_blocks / 2 for b in blocks) if self.detach is None else self.detach
        return with_detach("SkipLinks", detached, [(b,) for b in blocks])[::-1]
