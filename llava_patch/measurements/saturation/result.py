"""What a saturation measurement found."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llava_patch.core import files
from llava_patch.core.errors import InputError
from llava_patch.measurements.saturation.curves import Curves
from llava_patch.measurements.saturation.recommend import (
    Recommendation,
    absent_from,
    deep_median,
    recommend,
    transition_layer,
)
from llava_patch.measurements.saturation.settings import DEFAULTS, Saturation

NAME = "saturation"


@dataclass(frozen=True)
class PatchOn:
    """What a patch on the measured model does to its image positions.

    Attributes:
        split: the layer at which image tokens leave the decoder; None: they stay.
        prune_at: the first layer without pruned image tokens; None: nothing is pruned.
        words: what the model is, such as "routed (lf, split 4)".
    """

    split: int | None
    prune_at: int | None
    words: str


@dataclass(frozen=True)
class SaturationResult:
    """What was measured and what follows from it.

    Attributes:
        curves: mean over samples, each of which counts the same.
        recommendation: the split and why.
        image_transition: layer number or None, see `recommend.transition_layer`.
        text_transition: the same at text positions.
        samples: number of samples measured.
        skipped: number of samples left out, by reason.
        settings: the settings used.
        patch: what a routing or pruning patch on the model does; None: the stock decoder.
        facts: what was measured, such as checkpoint, data and precision; plain JSON values.
    """

    curves: Curves
    recommendation: Recommendation
    image_transition: int | None
    text_transition: int | None
    samples: int
    skipped: dict[str, int]
    settings: Saturation = field(default_factory=Saturation)
    patch: PatchOn | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        """Number L of decoder layers."""
        return len(self.curves.image_cosine)

    @property
    def recommended_split(self) -> int | None:
        """First layer of the window, or None (see `recommendation.reason`)."""
        return self.recommendation.split

    @property
    def split(self) -> int | None:
        """The measured model's own split; None on a model that is not routed."""
        return None if self.patch is None else self.patch.split

    @property
    def deep_mass(self) -> float:
        """Median attention mass of the deep layers, see `recommend.deep_median`."""
        return deep_median(self.curves.mass)

    def depth_percent(self, layer: int | None) -> float | None:
        """A layer number as percent of the decoder's depth."""
        return None if layer is None else 100.0 * layer / self.n_layers

    def worded(self, layer: int | None) -> str:
        """A layer number with its percentage, such as "18 (56 %)"; "none" where there is none."""
        return "none" if layer is None else f"{layer} ({self.depth_percent(layer):.0f} %)"

    def summary(self) -> str:
        """What was found, in a few lines of plain text."""
        samples = f"{self.samples} sample" + "s" * (self.samples != 1)
        if self.recommendation.window is not None:
            first, last = self.recommendation.window
            head = f"Recommended split: layer {self.worded(self.recommended_split)} of {self.n_layers}, "
            head += f"window {first}..{last}"
        else:
            head = "No split is recommended"
        return (
            f"{head} ({samples}): {self.recommendation.reason}. Attention mass on the image is "
            f"{self.curves.mass[0]:.3g} at layer 0 and {self.deep_mass:.3g} in the deep median; transition layers: "
            f"image {self.worded(self.image_transition)}{self._why_none()}, text {self.worded(self.text_transition)}."
        )

    @property
    def image_leaves(self) -> int | None:
        """First layer without hidden states of image positions, or None when all layers have them."""
        return absent_from(self.curves.image_kl)

    def _why_none(self) -> str:
        if self.image_transition is not None or self.image_leaves is None:
            return ""
        return f" (not reached before the image leaves at layer {self.image_leaves})"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(head, rows): the curves, a line a layer."""
        c = self.curves
        head = ["layer", "image tokens", "cosine image", "text", "mass", "highest head", "KL image", "text"]
        rows = [
            [str(i), f"{c.image_keys[i]:g}", _number(c.image_cosine[i]), _number(c.text_cosine[i]), _number(c.mass[i]),
             _number(max(c.head_mass[i])), _number(c.image_kl[i]), _number(c.text_kl[i])]
            for i in range(self.n_layers)
        ]  # fmt: skip
        return head, rows

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; NaN becomes null."""
        window = self.recommendation.window
        return {
            "n_layers": self.n_layers,
            "samples": self.samples,
            "skipped": self.skipped,
            "recommended_split": self.recommended_split,
            "recommended_split_percent": self.depth_percent(self.recommended_split),
            "window": None if window is None else list(window),
            "reason": self.recommendation.reason,
            "image_transition_layer": self.image_transition,
            "image_transition_percent": self.depth_percent(self.image_transition),
            "image_leaves_layer": self.image_leaves,
            "text_transition_layer": self.text_transition,
            "text_transition_percent": self.depth_percent(self.text_transition),
            "patch": None if self.patch is None else asdict(self.patch),
            "attention_mass": files.plain(self.curves.mass),
            **files.plain(asdict(self.curves)),
            "settings": asdict(self.settings),
            "facts": self.facts,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SaturationResult":
        """Read what `to_dict` made; what follows from the curves is worked out again."""
        curves, settings = Curves.from_dict(values), Saturation(**values["settings"])
        patch = None if values["patch"] is None else PatchOn(**values["patch"])
        return summarise(curves, values["samples"], values["skipped"], settings, patch, values["facts"])

    def save(self, folder: str | Path, name: str = NAME) -> tuple[Path, Path]:
        """Write `<name>.json` and `<name>.png` into a folder, each atomically.

        Returns:
            The two paths.
        """
        from llava_patch.measurements.saturation.figure import saturation_figure

        folder = Path(folder)
        json_path = files.write_json(folder / f"{name}.json", self.to_dict())
        return json_path, saturation_figure(self, folder / f"{name}.png")


def read_result(path: Path) -> SaturationResult:
    """Read a `saturation.json`.

    Raises:
        InputError: it is missing, or not a file that this version wrote.
    """
    try:
        return SaturationResult.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not a saturation result of this version ({type(error).__name__}: {error}): measure again"
        ) from error


def summarise(
    curves: Curves,
    samples: int,
    skipped: dict[str, int] | None = None,
    settings: Saturation = DEFAULTS,
    patch: PatchOn | None = None,
    facts: dict[str, Any] | None = None,
) -> SaturationResult:
    """Transition layers and the recommended split of some curves; arguments as `SaturationResult` has them."""
    return SaturationResult(
        curves=curves,
        recommendation=recommend(
            curves.mass,
            curves.image_kl,
            curves.image_cosine,
            curves.image_present,
            transition_share=settings.transition_share,
            mass_tolerance=settings.mass_tolerance,
            fall_share=settings.fall_share,
            patched="" if patch is None else patch.words,
        ),
        image_transition=transition_layer(curves.image_kl, settings.transition_share),
        text_transition=transition_layer(curves.text_kl, settings.transition_share),
        samples=samples,
        skipped=dict(skipped or {}),
        settings=settings,
        patch=patch,
        facts=dict(facts or {}),
    )


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.3g}"
