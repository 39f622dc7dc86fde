"""What the attention maps of one or several checkpoints are, and how they are written."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.core.errors import InputError
from llava_patch.measurements.base import NOT_WRITTEN, Result, Table, decode, encode, encode_fields
from llava_patch.settings.checks import integer

if TYPE_CHECKING:
    from torch import Tensor

CLS, MEAN = "CLS token", "mean over patches"
WHOLE, OVERVIEW = "whole image", "overview tile"


@dataclass(frozen=True)
class AttentionMaps:
    """Settings of the attention maps.

    Source: "Detached Skip-Links and R-Probe", appendix A: CLS attention of block 4, mean over heads.

    Attributes:
        block: the ViT block whose attention is read, 1..N, counted as fusions count them.
        max_samples: stop after so many images; None: take all.
        chunk: attention queries held at a time, in towers without a CLS token (memory against speed).
    """

    block: int = 4
    max_samples: int | None = None
    chunk: int = 256

    def __post_init__(self) -> None:
        integer("AttentionMaps", "block", self.block, 1)
        integer("AttentionMaps", "chunk", self.chunk, 1)
        if self.max_samples is not None:
            integer("AttentionMaps", "max_samples", self.max_samples, 1)


DEFAULTS = AttentionMaps()


@dataclass(frozen=True, eq=False)
class View:
    """An image as the tower sees it."""

    pixels: Any  # uint8 [height, width, 3], cut to what the patches cover
    patch: int  # pixels of a patch's side


@dataclass(frozen=True)
class CheckpointMaps:
    """The maps of one checkpoint."""

    checkpoint: str  # its name
    query: str  # whose attention it is: `CLS`, or `MEAN` in a tower without a CLS token
    part: str  # what of each image the maps cover: `WHOLE`, or `OVERVIEW` where images are cut into tiles (anyres)
    block: int  # 1..n_blocks
    n_blocks: int  # of the tower
    maps: list[list[list[float]]]  # an image each: [rows][columns], the probability on each patch (mean over heads)
    source: str = ""  # where the checkpoint is
    # An image each, of those that the figure shows.
    views: list[View] = field(default_factory=list, compare=False, repr=False, metadata=NOT_WRITTEN)

    def scores(self, image: int) -> "Tensor":
        """The map of an image: float32 [rows, columns]."""
        import torch

        return torch.tensor(self.maps[image], dtype=torch.float32)

    def entropies(self) -> list[float]:
        """Entropy of each map in nats."""
        from llava_patch.measurements.attention_maps import maths

        return [maths.entropy(self.scores(i)) for i in range(len(self.maps))]

    def effective_patches(self) -> float:
        """Effective number of patches, exp(entropy), mean over images."""
        return sum(map(math.exp, self.entropies())) / len(self.maps)


@dataclass(frozen=True)
class AttentionMapsResult(Result):
    """Maps of the same images in one or several checkpoints."""

    NAME, TITLE = "attention_maps", "attention maps"
    FIGURE = "llava_patch.measurements.attention_maps.figure:attention_maps_figure"

    images: list[str]  # their names
    checkpoints: list[CheckpointMaps]  # in the order in which they were given
    settings: AttentionMaps = field(default_factory=AttentionMaps)

    def correlations(self, number: int) -> list[float]:
        """Correlation of each of a checkpoint's maps with the first checkpoint's; NaN where the grids differ."""
        from llava_patch.measurements.attention_maps import maths

        first, own = self.checkpoints[0], self.checkpoints[number]
        pairs = [(first.scores(i), own.scores(i)) for i in range(len(self.images))]
        return [maths.correlation(a, b) if a.shape == b.shape else math.nan for a, b in pairs]

    def beside(self, other: "AttentionMapsResult") -> "AttentionMapsResult":
        """This result with another one's checkpoints added; InputError where those are of other images or settings."""
        if other.images != self.images or other.settings != self.settings:
            raise InputError("attention maps of other images or with other settings cannot stand side by side")
        return AttentionMapsResult(self.images, [*self.checkpoints, *other.checkpoints], self.settings)

    def encode(self) -> dict[str, Any]:
        """A dictionary a checkpoint, with what follows from its maps."""
        found = []
        names = ("image", "map", "entropy", "effective_patches", "correlation_with_first")
        for number, one in enumerate(self.checkpoints):
            values, entropies = encode_fields(one), one.entropies()
            columns = self.images, values.pop("maps"), entropies, map(math.exp, entropies), self.correlations(number)
            values |= {"grid": list(one.scores(0).shape), "mean_effective_patches": one.effective_patches()}
            values["images"] = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
            found.append(values)
        return {
            "sources": [one.source for one in self.checkpoints],
            "checkpoints": found,
            "settings": encode(self.settings),
        }

    @classmethod
    def decode(cls, values: dict[str, Any]) -> "AttentionMapsResult":
        """Read the maps; the images themselves are not in the file, so no figure can be drawn from it."""
        found, names = values["checkpoints"], ("checkpoint", "source", "query", "part", "block", "n_blocks")
        return cls(
            [image["image"] for image in found[0]["images"]],
            [CheckpointMaps(**{n: one[n] for n in names}, maps=[i["map"] for i in one["images"]]) for one in found],
            decode(AttentionMaps, values["settings"]),
            facts=values.get("facts", {}),
        )

    def table(self) -> Table:
        """Head and rows, a checkpoint each; "like 1st" is the correlation with the first checkpoint's maps."""
        rows = []
        for number, one in enumerate(self.checkpoints):
            correlations = [value for value in self.correlations(number) if not math.isnan(value)]
            like = f"{sum(correlations) / len(correlations):.3f}" if correlations else "-"
            entropy = sum(one.entropies()) / len(one.maps)
            patches = f"{one.effective_patches():.1f} of {one.scores(0).numel()}"
            rows.append([one.checkpoint, one.query, f"{entropy:.3f}", patches, like])
        return ["checkpoint", "query", "entropy", "effective patches", "like 1st"], rows

    def summary(self) -> str:
        """What was found, in a sentence a checkpoint."""
        first = self.checkpoints[0]
        lines = [f"Attention of ViT block {first.block} over {len(self.images)} images ({first.query}, {first.part})."]
        for number, (one, row) in enumerate(zip(self.checkpoints, self.table()[1], strict=True)):
            like = f", correlation {row[4]} with {first.checkpoint}" if number and row[4] != "-" else ""
            who = f" ({one.query})" if one.query != first.query else ""
            lines.append(f"{one.checkpoint}{who}: {row[3]} patches carry it{like}.")
        return " ".join(lines)

    def draw(self, path: Path) -> Path:
        """Write the figure; InputError for a result read from JSON, which has no images to draw."""
        if not all(one.views for one in self.checkpoints):
            raise InputError("attention maps read from JSON cannot be drawn again: the images are not in it")
        return super().draw(path)
