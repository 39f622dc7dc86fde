"""Settings of the drift measurement, and what it found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llava_patch.core import files
from llava_patch.core.errors import SettingError
from llava_patch.settings.checks import integer


@dataclass(frozen=True)
class Drift:
    """Settings of the drift measurement.

    Source: "Late-Layer Fusion is Enough" (DPVR), section 3.2.

    Attributes:
        base: what the lmms-eval task compares with; "": what the checkpoint's record names. The command has BASE.
        split: s, how many layers are compared (0..s-1); None: those below the split of a routed or pruned
            model, or all.
        together: keep both models in memory. Otherwise one runs after the other, and the first one's hidden states wait
            on disk.
        store_gb: how much they may take there, in 10^9 bytes; a run that would need more is refused.
        max_samples: stop after so many usable samples; None: take all.
    """

    base: str = ""
    split: int | None = None
    together: bool = False
    store_gb: float = 20.0
    max_samples: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.base, str):
            raise SettingError(f"Drift.base = {self.base!r}: expected a checkpoint's folder or name")
        if not isinstance(self.together, bool):
            raise SettingError(f"Drift.together = {self.together!r}: expected True or False")
        for name in ("split", "max_samples"):
            if getattr(self, name) is not None:
                integer("Drift", name, getattr(self, name), 1)
        size = self.store_gb
        if isinstance(size, bool) or not isinstance(size, (int, float)) or not size > 0:
            raise SettingError(f"Drift.store_gb = {size!r}: expected a number above 0")


DEFAULTS = Drift()


@dataclass(frozen=True)
class DriftCurves:
    """Cosines of one kind of position.

    Attributes:
        median: per layer 0..s-1, over all positions of all samples; exact.
        low: the same, but 5 % of the positions lie below.
        input: median at the input of layer 0: what tower, projector and embeddings changed.
        input_low: there too, 5 % of the positions lie below.
        positions: how many.
    """

    median: list[float]
    low: list[float]
    input: float
    input_low: float
    positions: int


@dataclass(frozen=True)
class DriftResult:
    """What was measured.

    Attributes:
        image: cosines at image positions.
        text: at text positions (everything that is not image).
        n_layers: L, of the whole decoder.
        split: s where the model routes or prunes; None: nothing leaves the decoder, or s was set.
        samples: number of samples.
        skipped: number of samples without an image.
        checkpoint: what was measured.
        base: what with.
        settings: the settings used.
        prunes: whether `split` is the first layer without pruned image tokens, rather than a routed model's split.
    """

    image: DriftCurves
    text: DriftCurves
    n_layers: int
    split: int | None
    samples: int
    skipped: int = 0
    checkpoint: str = ""
    base: str = ""
    settings: Drift = field(default_factory=Drift)
    prunes: bool = False

    @property
    def layers(self) -> int:
        """How many layers were compared."""
        return len(self.image.median)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain: dict[str, Any] = files.plain({"sources": [self.checkpoint, self.base], **asdict(self)})
        return plain

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DriftResult":
        """Read what `to_dict` made."""
        plain = {k: v for k, v in values.items() if k not in ("sources", "facts", "image", "text", "settings")}
        return cls(
            DriftCurves(**values["image"]), DriftCurves(**values["text"]), settings=Drift(**values["settings"]), **plain
        )

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows: a layer each."""
        curves = (self.image, self.text)
        rows = [["input", *(f"{c.input:.6f}" for c in curves), *(f"{c.input_low:.6f}" for c in curves)]]
        for layer in range(self.layers):
            cells = [f"{c.median[layer]:.6f}" for c in curves] + [f"{c.low[layer]:.6f}" for c in curves]
            rows.append([str(layer), *cells])
        return ["layer", "image", "text", "image, worst 5 %", "text, worst 5 %"], rows

    def summary(self) -> str:
        """What was found, in one or two sentences."""
        lowest = {name: min(curves.median) for name, curves in (("image", self.image), ("text", self.text))}
        over = f"over {self.samples} samples, layers 0..{self.layers - 1}"
        if (
            min(lowest.values())
            == 1.0
            == min(*self.image.low, *self.text.low, self.image.input_low, self.text.input_low)
        ):
            return f"No drift: hidden states are the base's, cosine 1 at image and text positions, {over}."
        where = {
            name: curves.median.index(lowest[name]) for name, curves in (("image", self.image), ("text", self.text))
        }
        return (
            f"Lowest median cosine with the base: image {lowest['image']:.6f} (layer {where['image']}), text "
            f"{lowest['text']:.6f} (layer {where['text']}), {over}. At the input of layer 0: image "
            f"{self.image.input:.6f}, text {self.text.input:.6f}."
        )

    def save(self, folder: str | Path, name: str = "drift") -> tuple[Path, Path]:
        """Write `<name>.json` and `<name>.png` into a folder, each atomically.

        Returns:
            The two paths.
        """
        from llava_patch.measurements.drift.figure import drift_figure

        folder = Path(folder)
        json_path = files.write_json(folder / f"{name}.json", self.to_dict())
        return json_path, drift_figure(self, folder / f"{name}.png")
