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
AUTO = "auto"
"""Routing.split: measure instead of naming a layer."""
VARIANTS = ("lf", "pc", "kv", "ideal", "vtw")
LEARNING_VARIANTS = ("lf", "pc", "kv")
"""Variants in which text reads the side branch, so that it can learn."""
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
    """DPVR routing of image tokens around the deep decoder layers, its variants and the VTW baseline.

    Source: "Late-Layer Fusion is Enough" (DPVR), section 3; VTW: "Boosting Multimodal LLMs with Visual Tokens
    Withdrawal". With L layers: layers 0..split-1 run as in the stock model; the side branch (n trainable layers) runs
    on the image positions. What the deep layers split..L-1 do with the image is the variant's:

    - "lf" (late-layer fusion): they run on text positions only, the fusion layers on both.
    - "pc": each runs on both, the image positions reset to the side branch's output.
    - "kv": as pc, but image positions give keys and values only.
    - "ideal": they run on text positions only; image positions end as the side branch's output.
    - "vtw": as ideal without a side branch; image positions end as they left the decoder.

    Attributes:
        variant: one of the above.
        split: first layer that image tokens leave out, 0..L-K; split = L routes nothing; "auto": what the saturation
            measurement recommends on the user's own samples.
        fusion_layers: lf: K, how many of the last layers see image and text again, or a tuple of layer numbers (sparse
            fusion). 0 for ideal and vtw, whatever the default.
        side_layers: n, depth of the side branch; it starts as a copy of layers split..split+n-1. 0 for vtw.
        freeze: "all_but_single" trains the side branch only, "side_and_fusion" also the fusion layers, "none" leaves
            the flags as the training script set them. None: "all_but_single" where a side branch can learn (lf, pc,
            kv), else "none".
    """

    KIND: ClassVar[str] = "routing"

    variant: str = "lf"
    split: int | str = 18
    fusion_layers: int | tuple[int, ...] = 1
    side_layers: int = 1
    freeze: str | None = None

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise SettingError(f"Routing.variant = {self.variant!r}: expected one of {', '.join(VARIANTS)}")
        if self.split != AUTO:
            if isinstance(self.split, str):
                raise SettingError(f'Routing.split = {self.split!r}: expected a layer number or "auto"')
            _integer("Routing", "split", self.split, 0)
        self._check_fusion_layers()
        _integer("Routing", "side_layers", self.side_layers, 0)
        if self.variant == "vtw":
            if self.side_layers > 1:
                raise SettingError(f"Routing.side_layers = {self.side_layers}: vtw has no side branch; leave it out")
            object.__setattr__(self, "side_layers", 0)
        learns = self.variant in LEARNING_VARIANTS
        if self.freeze is None:
            object.__setattr__(self, "freeze", "all_but_single" if learns else "none")
        if self.freeze not in FREEZE_STRATEGIES:
            raise SettingError(f"Routing.freeze = {self.freeze!r}: expected one of {', '.join(FREEZE_STRATEGIES)}")
        if self.freeze == "side_and_fusion" and self.variant in ("pc", "kv"):
            raise SettingError(
                f'Routing.freeze = "side_and_fusion": {self.variant} has no fusion layer; use "all_but_single"'
            )
        if self.freeze != "none" and not learns:
            why = (
                "has no side branch"
                if self.variant == "vtw"
                else "never shows the side branch's output to a text token"
            )
            raise SettingError(
                f'Routing.freeze = "{self.freeze}" leaves nothing to train: {self.variant} {why}; set Routing.freeze = '
                '"none", or use variant "lf"'
            )

    def _check_fusion_layers(self) -> None:
        value = self.fusion_layers
        if isinstance(value, (tuple, list)):
            layers = tuple(value)
            for layer in layers:
                _integer("Routing", "fusion_layers", layer, 0)
            if len(set(layers)) != len(layers) or not layers:
                raise SettingError(f"Routing.fusion_layers = {layers}: expected distinct layer numbers, at least one")
            object.__setattr__(self, "fusion_layers", tuple(sorted(layers)))
            if self.variant != "lf":
                raise SettingError(f"Routing.fusion_layers = {layers}: only lf fuses; {self.variant} takes the default")
            return
        _integer("Routing", "fusion_layers", value, 0)
        if self.variant in ("ideal", "vtw"):
            if value > 1:
                raise SettingError(f"Routing.fusion_layers = {value}: {self.variant} has no fusion layer; leave it out")
            object.__setattr__(self, "fusion_layers", 0)
        elif self.variant in ("pc", "kv") and value != 1:
            raise SettingError(
                f"Routing.fusion_layers = {value}: {self.variant} shows the image to every deep layer, so there is no "
                "number of fusion layers to choose; leave it at 1"
            )


@dataclass(frozen=True)
class FastV:
    """FastV: image tokens that the prompt's last token hardly looks at leave the decoder for good.

    Source: "An Image is Worth 1/2 Tokens After Layer 2" (FastV), section 4. Before layer k, each sample keeps
    ceil((1 - r) * n) of its n image tokens: those with the highest attention from the last prompt token at layer k-1,
    mean over heads; the lower position wins ties, order and position ids stay. The choice is made once, at the prefill
    that brings the image (of a prompt in chunks, by the last token of the image's chunk). Positions that are read (a
    label follows at once, or generation samples from them) are kept.

    Attributes:
        layer: k >= 1, first layer without the pruned tokens.
        ratio: r, share of image tokens to prune, 0..1; 0 prunes nothing.
        training: prune in training mode too (the last token that is not padding then stands for the prompt's last).
    """

    KIND: ClassVar[str] = "pruning"

    layer: int = 2
    ratio: float = 0.5
    training: bool = False

    def __post_init__(self) -> None:
        _integer("FastV", "layer", self.layer, 1)
        number = isinstance(self.ratio, (int, float)) and not isinstance(self.ratio, bool)
        if not number or not 0 <= self.ratio <= 1:
            raise SettingError(f"FastV.ratio = {self.ratio!r}: expected a number from 0 to 1")
        if not isinstance(self.training, bool):
            raise SettingError(f"FastV.training = {self.training!r}: expected True or False")


FUSIONS: tuple[type, ...] = (SkipLinks,)
METHODS: dict[str, Any] = {"SkipLinks": SkipLinks, "Routing": Routing, "FastV": FastV}
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
    if name == "Routing" and values.get("split") == AUTO:
        raise SettingError(
            f'{source}: Routing.split = "{AUTO}" in a saved record; a record always holds the layer number: '
            "the file was changed by hand; write the number there"
        )
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
