"""What the attention maps of one or several checkpoints are, and how they are written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.core.errors import InputError
from llava_patch.measurements.base import Result, decode, encode
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
    """An image as the tower sees it: uint8 [height, width, 3], cut to what the patches cover."""

    pixels: Any
    patch: int

    def same(self, other: "View") -> bool:
        """Whether two views show the same pixels, up to one step of 8 bits."""
        if self.pixels.shape != other.pixels.shape:
            return False
        return int(abs(self.pixels.astype("int16") - other.pixels.astype("int16")).max()) <= 1


@dataclass(frozen=True)
class CheckpointMaps:
    """The maps of one checkpoint.

    Attributes:
        checkpoint: its name.
        query: whose attention it is: `CLS`, or `MEAN` in a tower without a CLS token.
        part: what of each image the maps cover: `WHOLE`, or `OVERVIEW` where images are cut into tiles (anyres).
        block: 1..n_blocks.
        n_blocks: of the tower.
        maps: an image each: [rows][columns], the attention probability on each patch (mean over heads).
        source: where the checkpoint is.
        views: an image each, as the tower sees it; of images that the figure shows only, and not kept in JSON.
    """

    checkpoint: str
    query: str
    part: str
    block: int
    n_blocks: int
    maps: list[list[list[float]]]
    source: str = ""
    views: list[View] = field(default_factory=list, compare=False, repr=False)

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
    """Maps of the same images in one or several checkpoints.

    Attributes:
        images: their names.
        checkpoints: in the order in which they were given.
        settings: the settings used.
    """

    NAME, TITLE = "attention_maps", "attention maps"
    FIGURE = "llava_patch.measurements.attention_maps.figure:attention_maps_figure"

    images: list[str]
    checkpoints: list[CheckpointMaps]
    settings: AttentionMaps = field(default_factory=AttentionMaps)

    def correlations(self, number: int) -> list[float]:
        """Correlation of each of a checkpoint's maps with the first checkpoint's; NaN where the grids differ."""
        from llava_patch.measurements.attention_maps import maths

        first, own = self.checkpoints[0], self.checkpoints[number]
        pairs = [(first.scores(i), own.scores(i)) for i in range(len(self.images))]
        return [maths.correlation(a, b) if a.shape == b.shape else math.nan for a, b in pairs]

    def beside(self, other: "AttentionMapsResult") -> "AttentionMapsResult":
        """This result with another one's checkpoints added.

        Raises:
            InputError: they are of other images or settings.
        """
        if other.images != self.images or other.settings != self.settings:
            raise InputError("attention maps of other images or with other settings cannot stand side by side")
        return AttentionMapsResult(self.images, [*self.checkpoints, *other.checkpoints], self.settings)

    def encode(self) -> dict[str, Any]:
        """A dictionary a checkpoint, with what follows from its maps."""
        found = []
        for number, one in enumerate(self.checkpoints):
            entropies = one.entropies()
            found.append(
                {
                    "checkpoint": one.checkpoint,
                    "source": one.source,
                    "query": one.query,
                    "part": one.part,
                    "block": one.block,
                    "n_blocks": one.n_blocks,
                    "grid": list(one.scores(0).shape),
                    "mean_effective_patches": one.effective_patches(),
                    "images": [
                        {
                            "image": name,
                            "map": one.maps[i],
                            "entropy": entropies[i],
                            "effective_patches": math.exp(entropies[i]),
                            "correlation_with_first": self.correlations(number)[i],
                        }
                        for i, name in enumerate(self.images)
                    ],
                }
            )
        return {
            "sources": [one.source for one in self.checkpoints],
            "checkpoints": found,
            "settings": encode(self.settings),
            **({"facts": self.facts} if self.facts else {}),
        }

    @classmethod
    def decode(cls, values: dict[str, Any]) -> "AttentionMapsResult":
        """Read the maps; the images themselves are not in the file, so no figure can be drawn from it."""
        found = values["checkpoints"]
        names = ("checkpoint", "source", "query", "part", "block", "n_blocks")
        return cls(
            [image["image"] for image in found[0]["images"]],
            [CheckpointMaps(**{n: one[n] for n in names}, maps=[i["map"] for i in one["images"]]) for one in found],
            decode(AttentionMaps, values["settings"]),
            facts=values.get("facts", {}),
        )

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows, a checkpoint each; "like 1st" is the correlation with the first checkpoint's maps."""
        rows = []
        for number, one in enumerate(self.checkpoints):
            patches = one.scores(0).numel()
            correlations = [value for value in self.correlations(number) if not math.isnan(value)]
            mean = sum(correlations) / len(correlations) if correlations else math.nan
            entropies = one.entropies()
            rows.append(
                [
                    one.checkpoint,
                    one.query,
                    f"{sum(entropies) / len(entropies):.3f}",
                    f"{one.effective_patches():.1f} of {patches}",
                    "-" if math.isnan(mean) else f"{mean:.3f}",
                ]
            )
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
        """Write the figure.

        Raises:
            InputError: a result read from JSON, which has no images to draw.
        """
        if not all(one.views for one in self.checkpoints):
            raise InputError("attention maps read from JSON cannot be drawn again: the images are not in it")
        return super().draw(path)
