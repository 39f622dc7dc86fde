"""The attention maps: their settings, those of one or several checkpoints, their figure, and what is asked of them."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.core.errors import InputError, SettingError
from llava_patch.core.extras import optional
from llava_patch.core.paths import named
from llava_patch.data.examples import check_data
from llava_patch.data.target import ModelInputs, Target, examples_for
from llava_patch.measurements.base import NOT_WRITTEN, Measurement, Result, Table, decode, drawn, encode, encode_fields
from llava_patch.settings.checks import integer

if TYPE_CHECKING:
    from torch import Tensor

    from llava_patch.data.loaded import LoadedCheckpoint

CLS, MEAN = "CLS token", "mean over patches"
WHOLE, OVERVIEW = "whole image", "overview tile"
EVEN, ALIKE = 0.9, 0.8
"""Share of the patches above which a map is even, and correlation above which two are alike: this project's choice."""
CELL, HEAD = 1.35, 0.75  # inches: side of a picture, and what titles and the bar take


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
    FIGURE = "llava_patch.measurements.attention_maps.measurement:attention_maps_figure"

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
            decode(list[str], [image["image"] for image in found[0]["images"]]),
            [
                decode(CheckpointMaps, {**{n: one[n] for n in names}, "maps": [i["map"] for i in one["images"]]})
                for one in found
            ],
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

    def finding(self) -> str:
        """How narrowly the block looks, and whether the first two checkpoints look alike; the bounds are our choice."""
        first = self.checkpoints[0]
        share = first.effective_patches() / first.scores(0).numel()
        how = "at the whole image alike" if share > EVEN else f"at about {share:.0%} of the image"
        text = f"Block {first.block} looks {how}"
        known = [] if len(self.checkpoints) < 2 else [v for v in self.correlations(1) if not math.isnan(v)]
        if not known:
            return f"{text}."
        other, low, high = self.checkpoints[1].checkpoint, min(known), max(known)
        alike = f"; whether {other} looks at the same places is undecided"
        if low > ALIKE:
            alike = f", and {other} at the same places"
        elif high < ALIKE:
            alike = f", and {other} at other places"
        return f"{text}{alike}."

    def caution(self) -> str:
        """What a map does not say."""
        counts = [math.exp(value) for value in self.checkpoints[0].entropies()]
        return (
            f"Over these images the effective patches go from {min(counts):.1f} to {max(counts):.1f}. Where a "
            f"block looks "
            "is not what reaches the language model: R-Probe measures that."
        )

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


@drawn
def attention_maps_figure(result: AttentionMapsResult) -> Any:
    """Original || checkpoint A || B || ..., one row an image that has views, on white.

    An original stands before each checkpoint that sees the images otherwise.
    """
    from llava_patch.measurements.attention_maps import maths

    columns = _columns(result)
    rows = min(len(result.images), *(len(one.views) for one in result.checkpoints))
    height, width = result.checkpoints[0].views[0].pixels.shape[:2]
    size = CELL * len(columns) + 0.75, CELL * height / width * rows + HEAD
    figure = optional("matplotlib.figure").Figure(figsize=size, layout="constrained", facecolor="w")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for row in range(rows):
        for axis, (number, is_map) in zip(axes[row], columns, strict=True):
            one = result.checkpoints[number]
            view = one.views[row]
            if is_map:
                scores = one.scores(row)
                heat = maths.nearest(maths.min_max(scores), view.patch)
                picture = axis.imshow(heat.numpy(), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
                effective = f"{math.exp(maths.entropy(scores)):.1f} of {scores.numel()}"
                axis.set_xlabel(effective, fontsize=6, labelpad=2)  # no wider than a map: the title has the unit
            else:
                axis.imshow(view.pixels, interpolation="nearest")
            if row == 0:
                original = f"original ({one.checkpoint})" if number else "original"
                axis.set_title(_short(one.checkpoint if is_map else original), fontsize=7.5)
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
            for spine in axis.spines.values():  # a white page on white needs a border
                spine.set(color="0.8", linewidth=0.5)
    bar = figure.colorbar(picture, ax=list(axes[:, -1]), shrink=0.8 if rows == 1 else 0.5, aspect=20)
    bar.set_label("attention, min-max of each map", fontsize=6.5)
    bar.ax.tick_params(labelsize=6.5)
    figure.suptitle(_title(result), fontsize=8)
    return figure


def _columns(result: AttentionMapsResult) -> list[tuple[int, bool]]:
    """(checkpoint, whether it is a map) of each column."""
    columns: list[tuple[int, bool]] = []
    shown: list[View] | None = None
    for number, one in enumerate(result.checkpoints):
        if shown is None or not all(map(_same, shown, one.views)):
            columns.append((number, False))
            shown = one.views
        columns.append((number, True))
    return columns


def _same(one: View, other: View) -> bool:
    """Up to one step of 8 bits."""
    pair = one.pixels.astype("int16"), other.pixels.astype("int16")
    return pair[0].shape == pair[1].shape and int(abs(pair[0] - pair[1]).max()) <= 1


def _title(result: AttentionMapsResult) -> str:
    kinds = list(dict.fromkeys(one.query for one in result.checkpoints))
    parts = [part for part in dict.fromkeys(one.part for one in result.checkpoints) if part != WHOLE]
    blocks = ", ".join(dict.fromkeys(f"{one.block} of {one.n_blocks}" for one in result.checkpoints))
    who = " / ".join(kinds) + "".join(f", {part}" for part in parts)
    return f"Attention of ViT block {blocks} ({who})\nbelow each map: its effective number of patches"


def _short(name: str) -> str:
    """A long name in lines of at most 18 letters, cut behind the first separator from the 12th on if there is one."""
    return "\n".join(re.findall(r".{11,17}?[-_/. ]|.{18}|.+", name))


class AttentionMapsMeasurement(Measurement):
    """Which patches does a shallow ViT block look at? Checkpoints side by side.

    CLS-to-patch attention, mean over heads; in a tower without CLS the mean
    over all patches. Checkpoints are loaded one after the other.
    OUTPUT gets attention_maps.json and attention_maps.png.
    """

    name = "attention_maps"
    title = "Attention maps"
    about = (
        "Where does a shallow block of the vision tower look? Attention of the CLS token to the patches, mean over "
        "heads, from dark (least in the image) to bright (most). With the base beside it where the tower was trained."
    )
    alt = "A row an image: the image, and beside it which patches the block looks at."
    settings = AttentionMaps
    result = "llava_patch.measurements.attention_maps.measurement:AttentionMapsResult"
    samples = 4
    several = True
    aside = ("AttentionMaps.chunk",)
    sources = ("--image",)
    report_count = "maps"

    def check(self, data: str, samples: int | None, **options: Any) -> None:
        """Refuse images beside data, and images that are not there."""
        image = options["image"]
        if image and data:
            raise SettingError("--image and --data: give one of them")
        if image and samples is not None:
            raise SettingError("--samples belongs to --data: every --image is shown")
        missing = [one for one in image if not Path(one).is_file()]
        if missing:
            raise InputError(f"--image {missing[0]}: no such file (a folder of images is given with --data)")
        for one in image:
            check_data(one)

    def measure(
        self,
        target: Target,
        settings: AttentionMaps,
        folder: Path | None = None,
        *,
        image: list[str] = [],  # noqa: B006 - typer's way to say that an option may be repeated
    ) -> AttentionMapsResult:
        """Measure one checkpoint.

        Args:
            target: the checkpoint.
            settings: block, and how many images.
            folder: not needed.
            image: an image; may be repeated; instead of --data.
        """
        if image:
            settings = dataclasses.replace(settings, max_samples=len(image))
            examples = [example for path in image for example in examples_for(target.subject, path, 1)]
        else:
            examples = target.examples(settings.max_samples)
        return self.maps(target.subject, examples, settings, target.name, target.checkpoint)

    def report_words(self, context: Any, settings: AttentionMaps) -> list[str]:
        """Several checkpoints could follow: DATA is an option."""
        return [*(["--data", context.data] if context.data else []), "--samples", str(settings.max_samples)]

    def in_report(self, context: Any, settings: AttentionMaps) -> AttentionMapsResult:
        """With the base beside it where the tower was trained; an untrained one is the base's own."""
        examples = context.examples(settings.max_samples)
        own, below = Path(context.checkpoint).name, Path(context.base).name
        result = self.maps(context.subject, examples, settings, own, context.checkpoint)
        if not context.inspection.trained_tower or context.why_no_base() is not None:
            return result
        context.release()  # one model in memory at a time
        below += " (base)" * (below == own)
        return result.beside(self.maps(context.load_base(), examples, settings, below, context.base))

    def maps(
        self, subject: "LoadedCheckpoint", examples: list[Any], settings: AttentionMaps, label: str, checkpoint: str
    ) -> AttentionMapsResult:
        """The maps of a loaded checkpoint under a name."""
        from llava_patch.measurements.attention_maps.measure import measure_attention_maps

        return measure_attention_maps(
            subject.model,
            ModelInputs(subject, examples),
            settings,
            image_processor=subject.image_processor,
            checkpoint=label,
            images=[example.id for example in examples],
            source=named(checkpoint),
        )
