"""DeepStack: which blocks are tapped, which decoder layers take them; `deep_stack_decoder` projects and adds them."""

from dataclasses import dataclass

from llava_patch.fusion.base import Detach, Fusion, Group, Join, detach_setting, with_detach
from llava_patch.settings.checks import distinct_blocks, integer, refused

OWN, SHARED = "own", "shared"
PROJECTORS = (OWN, SHARED)


@dataclass(frozen=True, repr=False)
class DeepStack(Fusion):
    """DeepStack: projected features of other blocks are added to the image positions at several decoder layers.

    Source: "DeepStack" (Meng et al., 2024), whose code sends what it stacks through the model's own projector; with
    blocks of one tower as in the Skip-Links paper, section 6.4. The first tap is added to the input of layer `start`.

    Attributes:
        taps: blocks, in the order of the decoder layers; None: at N/4, N/2, 3N/4 and N-1 of a tower of N blocks
            (6, 12, 18, 23).
        start: decoder layer, from 0, that takes the first tap.
        interval: decoder layers from one tap to the next.
        detach: taps under stop-gradient: a number (that many shallowest), or places in `taps`, from 0.
        projector: what projects the taps. "own": one more projector for them all, whose last Linear starts at zero, so
            that before training the output is the stock model's bit for bit (this project's choice). "shared": the
            model's own, as published; nothing is added, and the output differs from the stock model's at once.
    """

    BLOCKS = "taps"

    taps: tuple[int, ...] | None = None
    start: int = 4
    interval: int = 2
    detach: Detach = ()
    projector: str = OWN

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("DeepStack", "start", self.start, 0)
        integer("DeepStack", "interval", self.interval, 1)
        object.__setattr__(self, "detach", detach_setting("DeepStack", self.detach))
        if self.taps is not None:
            object.__setattr__(self, "taps", distinct_blocks("DeepStack", "taps", self.taps, 1, ordered=True))
        if not isinstance(self.projector, str) or self.projector not in PROJECTORS:
            what = f'"{OWN}" (a second one, which starts at zero) or "{SHARED}" (the model\'s own)'
            raise refused("DeepStack", "projector", self.projector, what)

    @property
    def shares_projector(self) -> bool:
        """Whether the taps go through the model's own projector."""
        return self.projector == SHARED

    @property
    def join(self) -> Join:
        """Into the decoder."""
        return Join.LAYERS

    def choose(self, n_blocks: int, main: int) -> tuple[Group, ...]:
        """The taps in the order of the decoder layers; by default four at even distances."""
        if self.taps is None:
            blocks = tuple(sorted({max(1, n_blocks // 4), n_blocks // 2, 3 * n_blocks // 4, n_blocks - 1} - {0}))
        else:
            blocks = self.taps
        return with_detach("DeepStack", self.detach, [(b,) for b in blocks])

    def decoder_layers(self, n_taps: int) -> tuple[int, ...]:
        """Layers start, start + interval, ..."""
        return tuple(self.start + i * self.interval for i in range(n_taps))
