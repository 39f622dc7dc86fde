"""The gradient reach: what commands and report ask of it."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.core.errors import SettingError
from llava_patch.measurements.base import Measurement, Result, default_split, words
from llava_patch.measurements.reach.result import Reach, ReachComparison

if TYPE_CHECKING:
    from llava_patch.data.target import Target


class ReachMeasurement(Measurement):
    """Which parameters get a gradient, and how the side branch gets its own.

    One backward pass a sample, in training mode, with the checkpoint's patch
    or the one that gin bindings ask for. "none": no gradient arrives at
    something that trains; "exactly 0": only zeros do. Data need answers, or
    none are given (rendered pages).

    In full:

    llava-patch reach llava-v1.5-7b data.json --gin-param "Routing.split = 18"
    """

    name = "reach"
    title = "Gradient reach"
    about = (
        "Which parameters does a training step give a gradient under this patch, and through which layers does the "
        "side branch get its own? Flags are as the checkpoint's settings set them."
    )
    alt = "Norm of the gradient that reaches each part of the model, and the side branch's output layer by layer."
    settings = Reach
    result = "llava_patch.measurements.reach.result:ReachResult"
    samples = 4
    report_count = ""
    words = {"everything": "--all"}  # noqa: RUF012

    def check(self, data: str, samples: int | None, **options: Any) -> None:
        """Refuse a split without variants."""
        split = options["split"]
        if split is not None and not options["variants"]:
            raise SettingError(
                f'--split {split} belongs to --variants; one routing is --gin-param "Routing.split = {split}"'
            )

    def stem(self, **options: Any) -> str:
        """A comparison has files of its own."""
        return ReachComparison.NAME if options.get("variants") else self.name

    def in_report(self, context: Any, settings: Reach) -> Result:
        """Flags are as the loader leaves them."""
        from llava_patch.measurements.reach.measure import measure_reach

        samples = context.samples(settings.samples, answers=True)
        return measure_reach(context.subject.model, samples, settings)

    def measure(
        self,
        target: "Target",
        settings: Reach,
        folder: Path | None = None,
        *,
        variants: str = "",
        split: int | None = None,
    ) -> Result:
        """Measure one model, or the variants of routing on it one after the other.

        Args:
            target: the checkpoint.
            settings: how many samples, and whether every parameter is asked.
            folder: not needed.
            variants: routings to compare on a checkpoint without one, such as lf,pc,kv,ideal.
            split: with --variants: first routed layer; default: 18/32 of depth.
        """
        from llava_patch.hosts.anatomy import find
        from llava_patch.measurements.reach.measure import compare_reach, measure_reach
        from llava_patch.patching.handle import get_handle

        samples, model = target.samples(settings.samples, answers=True), target.subject.model
        settings = dataclasses.replace(settings, samples=settings.samples or len(samples))
        if variants:
            split = default_split(len(find(model).layers)) if split is None else split
            return compare_reach(model, lambda: samples, words(variants), split, settings)
        handle = get_handle(model)
        if handle is not None:  # llava loads its tower after the patch and freezes it; a training run does this too
            handle.apply_freeze()
        return measure_reach(model, samples, settings)
