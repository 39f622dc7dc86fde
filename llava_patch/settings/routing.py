"""Settings of what happens in the decoder: routing of image tokens."""

from dataclasses import dataclass
from typing import ClassVar

from llava_patch.core.errors import SettingError, shown
from llava_patch.settings.checks import choice, integer

AUTO = "auto"
"""Routing.split: measure instead of naming a layer."""
VARIANTS = ("lf", "pc", "kv", "ideal", "vtw")
LEARNING_VARIANTS = ("lf", "pc", "kv")
"""Variants in which text reads the side branch, so that it can learn."""
FREEZE_STRATEGIES = ("all_but_single", "side_and_fusion", "none")


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
        choice("Routing", "variant", self.variant, VARIANTS)
        if not isinstance(self.split, str) or self.split != AUTO:
            if isinstance(self.split, str):
                raise SettingError(f'Routing.split = {shown(self.split)}: expected a layer number or "auto"')
            integer("Routing", "split", self.split, 0)
        self._check_fusion_layers()
        integer("Routing", "side_layers", self.side_layers, 0)
        if self.variant == "vtw":
            if self.side_layers > 1:
                raise SettingError(f"Routing.side_layers = {self.side_layers}: vtw has no side branch; leave it out")
            object.__setattr__(self, "side_layers", 0)
        learns = self.variant in LEARNING_VARIANTS
        if self.freeze is None:
            object.__setattr__(self, "freeze", "all_but_single" if learns else "none")
        choice("Routing", "freeze", self.freeze, FREEZE_STRATEGIES)
        if self.freeze == "side_and_fusion" and self.variant in ("pc", "kv"):
            raise SettingError(
                f'Routing.freeze = "side_and_fusion": {self.variant} has no fusion layer; use "all_but_single"'
            )
        if self.freeze != "none" and not learns:
            why = {"vtw": "has no side branch", "ideal": "never shows the side branch's output to a text token"}
            raise SettingError(
                f'Routing.freeze = "{self.freeze}" leaves nothing to train: {self.variant} {why[self.variant]}; set '
                'Routing.freeze = "none", or use variant "lf"'
            )

    def check_saved(self, source: str) -> None:
        """Refuse split = "auto" (SettingError): a saved record, `source`, holds the layer number that was measured."""
        if self.split == AUTO:
            raise SettingError(
                f'{source}: Routing.split = "{AUTO}" in a saved record; a record always holds the layer number: '
                "the file was changed by hand; write the number there"
            )

    def _check_fusion_layers(self) -> None:
        value = tuple(self.fusion_layers) if isinstance(self.fusion_layers, (tuple, list)) else self.fusion_layers
        for layer in value if isinstance(value, tuple) else (value,):
            integer("Routing", "fusion_layers", layer, 0)
        if isinstance(value, tuple):
            if len(set(value)) != len(value) or not value:
                raise SettingError(
                    f"Routing.fusion_layers = {shown(value)}: expected distinct layer numbers, at least one"
                )
            if self.variant != "lf":
                raise SettingError(
                    f"Routing.fusion_layers = {shown(value)}: only lf fuses; {self.variant} takes the default"
                )
            object.__setattr__(self, "fusion_layers", tuple(sorted(value)))
        elif self.variant in ("ideal", "vtw"):
            if value > 1:
                raise SettingError(f"Routing.fusion_layers = {value}: {self.variant} has no fusion layer; leave it out")
            object.__setattr__(self, "fusion_layers", 0)
        elif self.variant in ("pc", "kv") and value != 1:
            raise SettingError(
                f"Routing.fusion_layers = {value}: {self.variant} shows the image to every deep layer, so there is no "
                "number of fusion layers to choose; leave it at 1"
            )
