"""Settings of every method as frozen dataclasses; checks that need no model happen here.

This file imports neither torch nor gin, so that `import llava_patch` stays cheap. How the same names are bound
from gin files is in `config.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Union

from llava_patch.errors import SettingError

TrainTower = Union[Literal["frozen", "all"], int]
VARIANTS = ("lf", "pc", "kv", "ideal", "vtw")
FREEZE_STRATEGIES = ("all_but_single", "side_and_fusion", "none")


def _integer(owner: str, name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise SettingError(f"{owner}.{name} = {value!r}: expected an integer >= {minimum}")


def _train_tower(owner: str, value: Any) -> None:
    if value in ("frozen", "all"):
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingError(
            f'{owner}.train_tower = {value!r}: expected "frozen", "all" or k >= 1 (train the last k used blocks)'
        )


@dataclass(frozen=True)
class SkipLinks:
    """Detached Skip-Links: shallow ViT blocks feed the projector, without gradient through the shallow taps.

    Source: "Detached Skip-Links and R-Probe", section 3, eq. 1.

    Attributes:
        stride: take blocks S, 2S, 3S, ... of the vision tower as taps (ignored when `layers` is given).
        detach: how many of the shallowest taps are under stop-gradient; None: those in the lower half of the tower.
        layers: explicit tap blocks (1 = output of the first block) instead of a stride.
        merge_size: join m x m neighbouring patches on channels before the projector; 1 is LLaVA-1.5's behaviour.
        train_tower: what trains in the vision tower: "frozen", "all", or the last k blocks that are used.
    """

    KIND: ClassVar[str] = "fusion"

    stride: int = 6
    detach: int | None = None
    layers: tuple[int, ...] | None = None
    merge_size: int = 1
    train_tower: TrainTower = "frozen"

    def __post_init__(self) -> None:
        _integer("SkipLinks", "stride", self.stride, 1)
        if self.detach is not None:
            _integer("SkipLinks", "detach", self.detach, 0)
        if self.layers is not None:
            layers = tuple(self.layers)
            if not layers:
                raise SettingError("SkipLinks.layers = (): no tap left; name at least one block")
            for layer in layers:
                _integer("SkipLinks", "layers", layer, 1)
            if len(set(layers)) != len(layers):
                raise SettingError(f"SkipLinks.layers = {layers}: a block is named twice")
            object.__setattr__(self, "layers", tuple(sorted(layers)))
        if self.merge_size != 1:
            raise SettingError(
                f"SkipLinks.merge_size = {self.merge_size!r}: only 1 (LLaVA-1.5) is available in this version"
            )
        _train_tower("SkipLinks", self.train_tower)


@dataclass(frozen=True)
class Routing:
    """DPVR routing of image tokens around the deep decoder layers.

    Source: "Late-Layer Fusion is Enough" (DPVR), section 3. With L layers: layers 0..split-1 run as in the stock
    model; the side branch (n trainable layers) runs on the image positions; layers split..L-K-1 run on text positions
    only; the last K layers see both again.

    Attributes:
        variant: "lf" (late-layer fusion); the other variants of the paper are named but not available yet.
        split: first layer that image tokens leave out, 0..L-K; split = L routes nothing.
        fusion_layers: K, how many of the last layers see image and text again.
        side_layers: n, depth of the side branch; it starts as a copy of layers split..split+n-1.
        freeze: "all_but_single" trains the side branch only, "side_and_fusion" also the fusion layers, "none" leaves
            the flags as the training script set them.
    """

    KIND: ClassVar[str] = "routing"

    variant: str = "lf"
    split: int | str = 18
    fusion_layers: int = 1
    side_layers: int = 1
    freeze: str = "all_but_single"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise SettingError(f"Routing.variant = {self.variant!r}: expected one of {', '.join(VARIANTS)}")
        if self.variant != "lf":
            raise SettingError(f'Routing.variant = {self.variant!r} is not available in this version; use "lf"')
        if self.split == "auto":
            raise SettingError(
                'Routing.split = "auto" is not available in this version; run the `saturation` task and bind the '
                "split it recommends"
            )
        _integer("Routing", "split", self.split, 0)
        _integer("Routing", "fusion_layers", self.fusion_layers, 1)
        _integer("Routing", "side_layers", self.side_layers, 1)
        if self.freeze not in FREEZE_STRATEGIES:
            raise SettingError(f"Routing.freeze = {self.freeze!r}: expected one of {', '.join(FREEZE_STRATEGIES)}")


FUSIONS: tuple[type, ...] = (SkipLinks,)
METHODS: dict[str, Any] = {"SkipLinks": SkipLinks, "Routing": Routing}
Fusion = SkipLinks


def to_dict(settings: Any) -> dict[str, Any]:
    """Turn a settings dataclass into plain JSON values, with its class name under "method"."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()}
    return {"method": type(settings).__name__, **values}


def from_dict(values: dict[str, Any], source: str) -> Any:
    """Rebuild a settings dataclass from `to_dict`'s output.

    Args:
        values: the dictionary, with the class name under "method".
        source: file that it came from, for the error message.

    Raises:
        SettingError: unknown method or field, naming both and the file.
    """
    values = dict(values)
    name = values.pop("method", None)
    if name not in METHODS:
        raise SettingError(f"{source}: unknown method {name!r}; this version knows {', '.join(METHODS)}")
    cls = METHODS[name]
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise SettingError(
            f"{source}: {name} has no setting {', '.join(unknown)}; saved by a newer version of llava_patch?"
        )
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
