"""What one R-Probe run found, and how it is written down."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_patch.files import atomic
from llava_patch.probe.sample import Box


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """One held-out region as it is and as the probe rebuilt it, on the processed image.

    Attributes:
        id: of the sample.
        text: transcript of the region.
        boxes: the region, each (x0, y0, x1, y1) in pixels of the processed image.
        original: uint8 [height, width, 3].
        rebuilt: uint8 [height, width, 3], the original with the pixels under target tokens replaced.
        target: bool [height, width], the pixels under target tokens.
        mse: per-token MSE of the sample, in normalised pixels.
    """

    id: str
    text: str
    boxes: tuple[Box, ...]
    original: np.ndarray
    rebuilt: np.ndarray
    target: np.ndarray
    mse: float


@dataclass(frozen=True, eq=False)
class RProbeResult:
    """Held-out error of one probe, beside the baselines that give it a meaning.

    Errors are in the image processor's normalised pixels, mean inside a token, then over all held-out target tokens.

    Attributes:
        mse: final per-token MSE.
        fvu: MSE divided by the variance of the held-out targets (fraction of variance unexplained).
        psnr: peak signal-to-noise ratio in dB on de-normalised, clipped pixels, mean over held-out samples.
        constant_mse: MSE of the best constant patch (the mean training target): a probe above it learned nothing.
        constant_fvu: the same divided by the variance.
        target_variance: variance of the held-out targets about their mean patch.
        steps_to_threshold: first step at which the running training MSE was under `threshold`; None: never.
        threshold: `RProbe.threshold`.
        threshold_is_vacuous: the constant patch is already under it, so those steps say nothing.
        steps_to_half_fvu: first step at which the running training MSE was under half the training targets' variance.
        documents: for every held-out sample its id, document, text, target tokens, mse and psnr.
        losses: training MSE of each step.
        running: its running mean, which starts at the constant patch's MSE.
        settings: the settings of the run.
        facts: what else one needs to compare two runs (decoder layers, learning rate, sample counts, host, ...).
        warnings: what the user was warned of.
        examples: reconstructions for figures; not part of the JSON.
    """

    mse: float
    fvu: float
    psnr: float
    constant_mse: float
    constant_fvu: float
    target_variance: float
    steps_to_threshold: int | None
    threshold: float
    threshold_is_vacuous: bool
    steps_to_half_fvu: int | None
    documents: list[dict[str, Any]]
    losses: list[float]
    running: list[float]
    settings: dict[str, Any]
    facts: dict[str, Any]
    warnings: list[str]
    examples: list[Reconstruction]

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain JSON values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "examples"}

    def summary(self) -> str:
        """The result in one line."""
        vacuous = " (vacuous: a constant is under it)" if self.threshold_is_vacuous else ""
        return (
            f"R-Probe: held-out MSE {self.mse:.4f}, FVU {self.fvu:.3f} (constant {self.constant_mse:.4f}, "
            f"{self.constant_fvu:.3f}), PSNR {self.psnr:.1f} dB, steps to MSE < {self.threshold:g}: "
            f"{self.steps_to_threshold}{vacuous}, to FVU < 0.5: {self.steps_to_half_fvu}"
        )


def write_json(result: RProbeResult, path: str | Path) -> Path:
    """Write a result as JSON; the file appears complete or not at all."""
    text = json.dumps(result.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    path = Path(path)
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")
    return path
