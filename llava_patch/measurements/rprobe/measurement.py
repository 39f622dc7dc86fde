"""R-Probe as a measurement: its settings, its result, and one run on a checkpoint. Imports no torch."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Optional

from llava_patch.measurements.base import Measurement
from llava_patch.measurements.rprobe.settings import RProbe

if TYPE_CHECKING:
    from llava_patch.data.readers import Samples
    from llava_patch.data.target import Target
    from llava_patch.measurements.rprobe.result import RProbeResult

Sources = tuple[Optional["Samples"], Optional["Samples"]]
"""Samples to train and to measure on; None: rendered pages, a share of the first."""


class RProbeMeasurement(Measurement):
    """Train a small decoder on a model's visual tokens; how well does it rebuild pixels?

    Every setting of RProbe can be bound with --gin-param; options of the
    command line win over bindings, and bindings over defaults.

    OUTPUT gets rprobe.json, rprobe.png, map-N.png and, with --keep-decoder,
    decoder.safetensors (6.4 GB at 7B), which other figures of the same run
    need; with --ablation a folder with these for each of the four runs, and
    ablation.json and ablation.md. A folder with results of another checkpoint
    is refused: without --output, checkpoints of one folder name share one.

    Interrupted (Ctrl-C), the same command goes on from the last state, which
    is written every RProbe.save_every steps. With several GPUs:
    torchrun --nproc-per-node N -m llava_patch.cli.main rprobe CKPT ...
    """

    name = "rprobe"
    title = "R-Probe"
    settings = RProbe
    result = "llava_patch.measurements.rprobe.result:RProbeResult"
    resumes = True
    extras = ("figures", "probe")
    words: ClassVar = {"masked": "--masked/--full"}
    aside = (
        "RProbe.store", "RProbe.store_gb", "RProbe.save_every", "RProbe.minutes", "RProbe.examples", "RProbe.maps",
        "RProbe.resamples", "RProbe.keep_decoder", "--show",
    )  # fmt: skip
    sources = ("--heldout",)

    def measure(
        self,
        target: "Target",
        settings: RProbe,
        folder: Path | None = None,
        sources: Sources | None = None,
        again: bool = False,
        *,
        heldout: str = "",
        show: list[str] | None = None,
    ) -> "RProbeResult":
        """Train one probe and measure it on held-out samples.

        Args:
            target: the checkpoint and the data to train on, as `read_samples` takes them; "": rendered pages.
            settings: of the probe.
            folder: of the state from which an interrupted run goes on, and of the finished decoder; None: nowhere.
            sources: both data, where they are read already.
            again: train although the folder holds this run's result.
            heldout: data to measure on, like DATA; default: a share of DATA's documents.
            show: id of a held-out sample to draw; may be repeated; default: spread over the errors.
        """
        from llava_patch.data.readers.read import resolve_source
        from llava_patch.measurements.rprobe.fit import run_rprobe

        samples, measured = sources or (read(target.data, settings), read(heldout, settings))
        one = target.subject
        parts = one.model, one.image_processor, one.tokenizer
        result = run_rprobe(*parts, settings, samples, measured, work=folder, show=show or (), again=again)
        if result.kept:
            return result
        named = {"source": resolve_source(target.data), "heldout_source": resolve_source(heldout)}
        return dataclasses.replace(result, facts={**result.facts, "base": target.below, **named})


def read(source: str, settings: RProbe) -> "Samples | None":
    """Samples of one's own; None: there is no source."""
    from llava_patch.data.readers import read_samples

    return read_samples(source, settings.boxes_per_sample, settings.broken) if source else None
