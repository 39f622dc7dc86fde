"""What prunings of several stages have in common: at which layers, and how many tokens each of them leaves."""

from __future__ import annotations

from dataclasses import dataclass

from llava_patch.core.errors import SettingError, shown
from llava_patch.routing.pruning import Pruning, tokens_left
from llava_patch.settings.checks import choice, flag, integer, is_integer, is_number, refused


@dataclass(frozen=True)
class Staged(Pruning):
    """Before each of some layers, a sample keeps a share (or a number) of the image tokens that it began with.

    Attributes:
        layers: k >= 1 of each stage, the first layer without what it drops, in order.
        keep: what each stage leaves: a share of the sample's image tokens, 0.0..1.0, or, as an integer, a number of
            them; no stage more than the one before. 1.0 in every stage prunes nothing.
        training: prune in training mode too (the last token that is not padding then stands for the prompt's last).
        count: what becomes of a share that is no whole number: "int" (down), "round" (half to even) or "ceil".
    """

    layers: tuple[int, ...] = (8, 16, 24)
    keep: tuple[float, ...] = (0.5, 0.25, 0.125)
    training: bool = False
    count: str = "int"

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for name in ("layers", "keep"):
            values = getattr(self, name)
            if not isinstance(values, (tuple, list)) or not values:
                raise refused(owner, name, values, "a tuple with a value for each stage")
            object.__setattr__(self, name, tuple(values))
        for layer in self.layers:
            integer(owner, "layers", layer, 1)
        if list(self.layers) != sorted(set(self.layers)):
            raise refused(owner, "layers", self.layers, "layers in order, none twice")
        if len(self.keep) != len(self.layers):
            raise SettingError(
                f"{owner}.keep = {shown(self.keep)}, but {owner}.layers = {shown(self.layers)}: give a value for each "
                "stage"
            )
        for value in self.keep:
            if not is_number(value) or value < 0 or (isinstance(value, float) and value > 1):
                raise refused(owner, "keep", self.keep, "shares from 0.0 to 1.0, or integers: numbers of tokens")
        if len({is_integer(value) for value in self.keep}) > 1 or list(self.keep) != sorted(self.keep, reverse=True):
            raise refused(owner, "keep", self.keep, "all shares or all numbers, none above the one before")
        flag(owner, "training", self.training)
        choice(owner, "count", self.count, ("int", "round", "ceil"))

    @property
    def stages(self) -> tuple[int, ...]:
        """Its layers; () where every stage keeps all."""
        return () if all(value == 1.0 and isinstance(value, float) for value in self.keep) else self.layers

    def keep_counts(self, stage: int, images: tuple[int, ...], protected: tuple[int, ...]) -> tuple[int, ...]:
        """How many of the n image positions that each sample began with are left after a stage."""
        value = self.keep[stage]
        left = [min(int(value), n) if is_integer(value) else tokens_left(value, n, self.count) for n in images]
        return tuple(map(max, left, protected))

    @property
    def label(self) -> str:
        """Name(layers, what they leave)."""
        return f"{type(self).__name__}({self.layers}, {self.keep})"

    @property
    def described(self) -> str:
        """What each stage leaves, and where."""
        left = ", ".join(str(value) if is_integer(value) else f"{value:.1%}" for value in self.keep)
        return f"to {left} of the image tokens at layers {', '.join(map(str, self.layers))}"
