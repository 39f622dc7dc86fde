"""The attention maps: what commands and report ask of them."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.core.errors import InputError, SettingError
from llava_patch.core.paths import named
from llava_patch.data.examples import check_data
from llava_patch.data.target import ModelInputs, Target, examples_for
from llava_patch.measurements.attention_maps.result import AttentionMaps, AttentionMapsResult
from llava_patch.measurements.base import Measurement

if TYPE_CHECKING:
    from llava_patch.data.loaded import LoadedCheckpoint


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
    result = "llava_patch.measurements.attention_maps.result:AttentionMapsResult"
    samples = 4
    several = True
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
