"""What each decoder layer does with the image positions: every variant as one row of modes. No tensors here.

`routing.reference` says the same in plain mathematics, `routing.routed_pass` runs it.
"""

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from llava_patch.core.errors import SettingError
from llava_patch.routing.pruning import Pruning
from llava_patch.settings.routing import Routing


class LayerMode(Enum):
    """What a layer does with the image positions."""

    STOCK = "all positions, as in the stock model"
    TEXT = "text positions only"
    FUSE = "all positions, image states handed on from layer to layer"
    RESET = "all positions, image states reset to the side branch's output"
    KEYS = "text positions ask, image positions give keys and values of the side branch's output"


DEEP_LAYERS = {
    "lf": LayerMode.TEXT,  # but FUSE in the fusion layers: the last K, or those that are named
    "pc": LayerMode.RESET,
    "kv": LayerMode.KEYS,
    "ideal": LayerMode.TEXT,  # the side branch's output leaves the decoder as it is
    "vtw": LayerMode.TEXT,  # the same without a side branch
}
"""What the layers from the split on do, by variant (DPVR, section 3); those below it run as in the stock model."""


def modes_of(routing: Routing | None, n_layers: int) -> tuple[LayerMode, ...]:
    """What each of L layers does under settings that fit the model, the split a number; None: nothing is routed."""
    modes = [LayerMode.STOCK] * n_layers
    if routing is None or (split := int(routing.split)) == n_layers:
        return tuple(modes)
    modes[split:] = [DEEP_LAYERS[routing.variant]] * (n_layers - split)
    if routing.variant == "lf":
        k = routing.fusion_layers
        for layer in k if isinstance(k, tuple) else range(n_layers - k, n_layers):
            modes[layer] = LayerMode.FUSE
    return tuple(modes)


@dataclass(frozen=True)
class LayerSchedule:
    """Settings resolved against a model's depth."""

    n_layers: int  # L
    split: int  # first routed layer; L when nothing is routed
    modes: tuple[LayerMode, ...]  # what each layer does, [L]
    side_layers: int = 0  # n; 0 without a side branch
    pruning: Pruning | None = None  # what is pruned and where; None: nothing
    injections: tuple[int, ...] = ()  # DeepStack: layers whose input takes a tap, in the order of the taps

    @cached_property
    def stages(self) -> dict[int, int]:
        """The layers that see fewer image tokens than the one before, by pruning, each with its number among them."""
        return {} if self.pruning is None else {layer: stage for stage, layer in enumerate(self.pruning.stages)}

    @property
    def prune_at(self) -> int | None:
        """First layer without some of the pruned tokens; None: nothing is pruned."""
        return next(iter(self.stages), None)

    @property
    def does_something(self) -> bool:
        """Whether it differs from the stock model at all."""
        return self.leaves_out or bool(self.injections)

    @property
    def leaves_out(self) -> bool:
        """Whether any layer sees fewer positions than in the stock model."""
        return self.split < self.n_layers or self.prune_at is not None

    @property
    def late_fusion(self) -> tuple[int, ...]:
        """The layers that see both streams again."""
        return tuple(i for i, mode in enumerate(self.modes) if mode is LayerMode.FUSE)

    @property
    def keys(self) -> tuple[int, ...]:
        """The layers that project the image's keys and values apart; the last one's image states are the output."""
        return tuple(i for i, mode in enumerate(self.modes[:-1]) if mode is LayerMode.KEYS)


def make_schedule(
    routing: Routing | None, pruning: Pruning | None, n_layers: int, injections: tuple[int, ...] = ()
) -> LayerSchedule:
    """Resolve settings, and DeepStack's layers (`injections`), against a model's depth L.

    SettingError: a split, K, n, pruning or injection layer that the model or the variant cannot take.
    """
    split = n_layers
    if routing is not None:
        _check_routing(routing, n_layers)
        split = int(routing.split)
    side_layers = routing.side_layers if routing is not None and split < n_layers else 0
    _check_injections(injections, n_layers, split)
    if pruning is not None and not pruning.stages:
        pruning = None
    if pruning is not None:
        last, why = n_layers - 1, f"this model has layers 0..{n_layers - 1}"
        if routing is not None and split < n_layers and routing.variant in ("lf", "ideal", "vtw"):
            last, why = split, f"{routing.variant} takes the image tokens out at layer {split}, so later there are none"
        owner, late = type(pruning).__name__, [layer for layer in pruning.stages if layer > last]
        if late and len(pruning.stages) == 1:
            raise SettingError(f"{owner}.layer = {late[0]} is outside 1..{last}: {why}")
        if late:
            raise SettingError(f"{owner}.layers = {pruning.stages}: {late[0]} is outside 1..{last}: {why}")
    return LayerSchedule(n_layers, split, modes_of(routing, n_layers), side_layers, pruning, injections)


def _check_injections(injections: tuple[int, ...], n_layers: int, split: int) -> None:
    outside = [layer for layer in injections if layer >= split]
    if not outside:
        return
    where = ", ".join(map(str, injections))
    if outside[-1] >= n_layers:
        raise SettingError(
            f"DeepStack adds its taps at layers {where}, but this model has layers 0..{n_layers - 1}: choose a smaller "
            "DeepStack.start or DeepStack.interval, or fewer taps"
        )
    raise SettingError(
        f"DeepStack adds its taps at layers {where}, but image tokens leave the decoder at Routing.split = {split}: "
        "choose a smaller DeepStack.start or DeepStack.interval, fewer taps, or a later split"
    )


def _check_routing(routing: Routing, n_layers: int) -> None:
    split, n, k = routing.split, routing.side_layers, routing.fusion_layers
    if isinstance(split, str):
        raise SettingError(
            'Routing.split = "auto" has not been resolved to a layer number: patch() needs samples for it, see '
            "patch(..., samples=...)"
        )
    if not isinstance(k, tuple) and k > n_layers:
        raise SettingError(f"Routing.fusion_layers = {k}: this model has {n_layers} layers")
    if split == n_layers:
        return
    if isinstance(k, tuple):
        if split > n_layers:
            raise SettingError(f"Routing.split = {split} is outside 0..{n_layers}: this model has {n_layers} layers")
        outside = [layer for layer in k if not split <= layer < n_layers]
        if outside:
            raise SettingError(
                f"Routing.fusion_layers = {k}: layer {outside[0]} is not one of the deep layers "
                f"{split}..{n_layers - 1}: leave it out, or choose another Routing.split"
            )
    else:
        if routing.variant == "lf" and k == 0:
            raise SettingError(
                f"Routing.fusion_layers = 0 with Routing.split = {split}: lf needs a fusion layer, or the image never "
                f'reaches the answer; that is variant "ideal" (split = {n_layers} routes nothing)'
            )
        if split > n_layers - k:
            raise SettingError(
                f"Routing.split = {split} is outside 0..{n_layers - k}: this model has L = {n_layers} layers and "
                f"Routing.fusion_layers = {k} of them fuse (split = {n_layers} routes nothing)"
            )
    if routing.variant != "vtw" and n == 0:
        raise SettingError(f"Routing.side_layers = 0: {routing.variant} needs a side branch of at least one layer")
    if split + n > n_layers:
        raise SettingError(
            f"Routing.side_layers = {n} with Routing.split = {split}: the side branch starts as a copy of layers "
            f"{split}..{split + n - 1}, but the last layer is {n_layers - 1}: at most {n_layers - split} fit"
        )
