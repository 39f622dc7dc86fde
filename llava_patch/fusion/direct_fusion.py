"""External direct fusion: features of other blocks on channels beside the main one."""

from dataclasses import dataclass

from llava_patch.core.errors import SettingError
from llava_patch.fusion.base import Detach, Fusion, Group, detach_setting, with_detach
from llava_patch.settings.checks import distinct_blocks, refused

NAMED_LAYERS = ("18", "3-18", "3-18-23", "3-20-25", "former", "latter", "all")
SIGLIP_BLOCKS, SIGLIP_LATTER = 27, tuple(range(15, 27))
"""The published "latter" of SigLIP so400m, whose main feature there is block 25; of CLIP it is the upper half."""


@dataclass(frozen=True, repr=False)
class DirectFusion(Fusion):
    """External direct fusion (ML): features of other blocks on channels beside the main one.

    Source: "Multi-Layer Visual Feature Fusion in Multimodal LLMs" (Lin et al., 2025), external direct fusion. Its code
    has "3-18-23" and "latter" for SigLIP too, with a main feature of block 25 of 27: the first is "3-20-25" here, and
    "latter" is what it has there. The other means on a tower that is not of 24 blocks are this project's choice.

    Attributes:
        layers: "18", "3-18", "3-18-23" or "3-20-25" (these blocks; the main one is there anyway), "former" (mean of the
            lower half of the blocks), "latter" (mean of the upper half; of 27 blocks that of 15 to 26), "all" (both
            means), or a tuple of blocks, which keeps its order.
        detach: taps under stop-gradient: a number (that many shallowest), or places in the set, from 0. The Skip-Links
            paper detaches the set's last layer (section 6.4), which is (1,) for "3-18"; the default detaches nothing.
    """

    BLOCKS = "layers"

    layers: str | tuple[int, ...] = "3-18"
    detach: Detach = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "detach", detach_setting("DirectFusion", self.detach))
        if isinstance(self.layers, str):
            if self.layers not in NAMED_LAYERS:
                expected = f"one of {', '.join(NAMED_LAYERS)}, or a tuple of blocks, as (3, 18)"
                raise refused("DirectFusion", "layers", self.layers, expected)
            return
        object.__setattr__(self, "layers", distinct_blocks("DirectFusion", "layers", self.layers, 1, ordered=True))

    def choose(self, n_blocks: int, main: int) -> tuple[Group, ...]:
        """The named blocks or means of halves, without the main block, which is there anyway."""
        half = n_blocks // 2
        former, latter = tuple(range(1, half + 1)), tuple(range(half + 1, n_blocks + 1))
        if n_blocks == SIGLIP_BLOCKS:
            latter = SIGLIP_LATTER
        named = {"former": [former], "latter": [latter], "all": [former, latter]}
        if isinstance(self.layers, str) and self.layers in named:
            groups = named[self.layers]
        else:
            layers = self.layers.split("-") if isinstance(self.layers, str) else self.layers
            blocks = [int(b) for b in layers]
            groups = [(b,) for b in blocks if b != main]
            if not groups:
                raise SettingError(f"DirectFusion.layers = {self.layers!r}: no tap left beside the main block {main}")
        return with_detach("DirectFusion", self.detach, groups)
