"""What one R-Probe run found, and how it is written down."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llava_patch.core.stored import is_finite
from llava_patch.measurements.base import LARGEST, NOT_WRITTEN, Result
from llava_patch.probe.sample import Box


@dataclass(frozen=True)
class Part:
    """Error of those pixels under target tokens that lie inside text boxes, or of those that lie outside.

    `mse` is in normalised pixels; `variance` the population variance of each channel's values, mean over channels;
    `fvu` their quotient, None where they do not vary. Inside and outside it may lie above that of all pixels: text and
    what is beside it differ in brightness more than within themselves. `share` is of all pixels under target tokens,
    0..1.
    """

    mse: float
    variance: float
    fvu: float | None
    share: float


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """One held-out region as it is and as the probe rebuilt it, on the processed image.

    `boxes` are the region in its pixels; `original` and `rebuilt` uint8 [height, width, 3], the second with the pixels
    under target tokens (`target`, bool [height, width]) replaced; `mse` in normalised pixels, `psnr` in dB; `stretch`
    is how much taller than wide a processed pixel is on the original image: figures undo it.
    """

    id: str
    text: str
    boxes: tuple[Box, ...]
    original: np.ndarray
    rebuilt: np.ndarray
    target: np.ndarray
    mse: float
    psnr: float = float("nan")
    stretch: float = 1.0


@dataclass(frozen=True, eq=False)
class ErrorMap:
    """One page as it is and as the probe rebuilt it, cell by cell.

    `id` is its document. Of the processed page `original` and `rebuilt` are uint8 [height, width, 3] (grey where
    nothing was rebuilt), `boxes` the text boxes in its pixels, `cell` the side of a cell, `stretch` as in
    `Reconstruction`. `error` is float32 [rows, columns], each cell's mean squared error in normalised pixels, nan where
    it was not rebuilt (padding, or a cell whose token the host drops); `text`, bool, where it touches a text box;
    `spoken`, bool, where it was rebuilt with its own text before it. The mean errors are of the text cells that were
    rebuilt, and of the others (None: there are none).
    """

    id: str
    original: np.ndarray
    rebuilt: np.ndarray
    error: np.ndarray
    text: np.ndarray
    spoken: np.ndarray
    boxes: tuple[Box, ...]
    cell: int
    stretch: float
    inside_mse: float
    outside_mse: float | None


@dataclass(frozen=True, repr=False)
class RProbeResult(Result):
    """Held-out error of one probe, beside the baselines that give it a meaning.

    Errors are in the image processor's normalised pixels, mean inside a token, then over all held-out target tokens.

    Attributes:
        mse: final per-token MSE.
        fvu: MSE divided by the variance of the held-out targets (fraction of variance unexplained).
        psnr: peak signal-to-noise ratio in dB on de-normalised, clipped pixels, mean over held-out samples.
        constant_mse: MSE of the best constant patch (the mean training target): a probe above it learned nothing.
        constant_fvu: the same divided by the variance.
        target_variance: variance of the held-out targets about their mean patch.
        mse_interval: bootstrap 95 % interval of the MSE over documents; None: fewer than 2 documents.
        fvu_interval: of the FVU, error and variance drawn together.
        inside: error of the target pixels that lie in a text box of their image; None: all boxes are under a pixel.
        outside: error of the others (a token reaches beyond its text); None: there are none.
        steps_to_threshold: first step at which the running training MSE was under `threshold`; None: never.
        threshold: `RProbe.threshold`.
        threshold_is_vacuous: a constant patch is already under it, on held-out or on training samples, so those steps
            say nothing.
        steps_to_half_fvu: first step at which the running training MSE was under half the training targets' variance.
        documents: for every held-out sample its id, document, text, target tokens, mse, psnr, variance (mean squared
            deviation from the held-out mean patch), inside_mse, inside_pixels, outside_mse and outside_pixels.
        losses: training MSE of each step.
        running: its running mean, which starts at the constant patch's MSE.
        settings: the settings of the run.
        warnings: what the user was warned of.
        examples: reconstructions for figures; not part of the JSON.
        maps: whole pages rebuilt piece by piece; not part of the JSON.
        kept: it is read from the folder of the same run, which is finished and has its pictures; not part of the JSON.
    """

    NAME, TITLE, VERSION = "rprobe", "R-Probe", 2
    FIGURE = "llava_patch.measurements.rprobe.figures:save_figure"

    mse: float
    fvu: float
    psnr: float
    constant_mse: float
    constant_fvu: float
    target_variance: float
    mse_interval: tuple[float, float] | None
    fvu_interval: tuple[float, float] | None
    inside: Part | None
    outside: Part | None
    steps_to_threshold: int | None
    threshold: float
    threshold_is_vacuous: bool
    steps_to_half_fvu: int | None
    documents: list[dict[str, Any]]
    losses: list[float]
    running: list[float]
    settings: dict[str, Any]
    warnings: list[str]
    examples: list[Reconstruction] = field(default_factory=list, compare=False, metadata=NOT_WRITTEN)
    maps: list[ErrorMap] = field(default_factory=list, compare=False, metadata=NOT_WRITTEN)
    kept: bool = field(default=False, compare=False, metadata=NOT_WRITTEN)

    def __repr__(self) -> str:
        return self.summary()

    def check(self) -> None:
        """Besides: what comparisons and figures read of settings and held-out samples."""
        super().check()
        texts, counts = ("id", "document", "text"), ("tokens",)
        for sample in self.documents:
            if not all(isinstance(sample[name], str) for name in texts):
                raise TypeError(f"documents: expected texts as {', '.join(texts)}")
            if not all(isinstance(sample[name], int) and 0 < sample[name] <= LARGEST for name in counts):
                raise TypeError("documents: expected a number of tokens above 0")
            wrong = [
                name for name, value in sample.items() if name not in texts and not (value is None or is_finite(value))
            ]
            if wrong or not is_finite(sample["mse"]) or not is_finite(sample["variance"]):
                raise TypeError(f"documents: {(wrong or ['mse'])[0]} is no number")
        if not self.documents or not self.losses or len(self.losses) != len(self.running):
            raise ValueError("no held-out sample, or not as many losses as running means")
        if not isinstance(self.settings["steps"], int) or not isinstance(self.settings.get("trained", "all"), str):
            raise TypeError("settings: expected those of RProbe")

    def caveat(self) -> str:
        """Why its figures do not compare with the paper's or with those of full probes; "" when they do."""
        found = []
        if not self.facts.get("comparable", True):
            found.append(f"only {self.settings['trained']} was trained")
        if self.facts.get("cut"):
            found.append(f"cut at step {len(self.losses)} of {self.settings['steps']}")
        return f"not comparable: {', '.join(found)}" if found else ""

    def parts(self) -> str:
        """MSE of the pixels inside text and beside it, " (in text 0.820, beside it 0.129)"; "" where there are none."""
        named = {"in text": self.inside, "beside it": self.outside}
        found = [f"{name} {part.mse:.3f}" for name, part in named.items() if part is not None]
        return f" ({', '.join(found)})" if found else ""

    def finding(self) -> str:
        """What the probe rebuilds the text's pixels from, and whether better than a constant patch."""
        if self.mse_interval is None:
            return "Undecided: an error of one held-out document has no interval; give more documents."
        low, high = self.mse_interval
        if high < self.constant_mse:
            left = f"better than a constant patch, with {self.fvu:.0%} of its variance left"
            if self.settings.get("masked"):
                told = "its text and what surrounds it" if self.settings.get("text") else "what surrounds it alone"
                return (
                    f"The region is masked, and the probe rebuilds it from {told} {left}: nothing of the tokens in it."
                )
            if self.settings.get("text"):
                return (
                    f"The probe rebuilds the text's pixels from tokens and transcript {left}; which of the two it "
                    "reads the ablation says (--ablation)."
                )
            return f"The projected tokens carry the text: the probe rebuilds it {left}."
        if low > self.constant_mse:
            return "The probe learned nothing: it is worse than a constant patch; train it longer before concluding."
        return "Undecided: the probe cannot be told from a constant patch; train it longer or give more documents."

    def caution(self) -> str:
        """What a probe's error is not."""
        own = f"It is {self.caveat()}. " if self.caveat() else ""
        return (
            f"{own}A longer training of the probe may lower its error: compare checkpoints under equal settings only."
        )

    def summary(self) -> str:
        """The result in one line."""
        caveat = f" ({self.caveat()})" if self.caveat() else ""
        vacuous = " (vacuous: a constant is under it)" if self.threshold_is_vacuous else ""
        spread = "" if self.mse_interval is None else " [{:.4f}, {:.4f}]".format(*self.mse_interval)
        documents = len({sample["document"] for sample in self.documents})
        return (
            f"R-Probe{caveat}: held-out MSE {self.mse:.4f}{spread}{self.parts()}, FVU {self.fvu:.3f} "
            f"(constant {self.constant_mse:.4f}, {self.constant_fvu:.3f}), PSNR {self.psnr:.1f} dB, "
            f"{len(self.documents)} samples of {documents} document{'s' * (documents != 1)}, "
            f"steps to MSE < {self.threshold:g}: {self.steps_to_threshold}{vacuous}, "
            f"to FVU < 0.5: {self.steps_to_half_fvu}"
        )
