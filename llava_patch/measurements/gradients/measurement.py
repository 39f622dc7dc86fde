"""The gradient statistics: their settings, and at one fixed checkpoint what commands and report ask of them."""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.core.errors import SettingError
from llava_patch.core.paths import named
from llava_patch.data.target import Target
from llava_patch.measurements.base import Measurement, NothingToMeasure
from llava_patch.settings import active
from llava_patch.settings.checks import choice, integer, number

if TYPE_CHECKING:
    from llava_patch.measurements.gradients.result import GradientsResult

RUN, ATTACHED = "run", "attached"
FULL = (RUN, ATTACHED)
TOWER = 0
"""`Gradients.block` of the whole tower."""
BATCH = 4
WINDOW = 16
"""Batches of one window in a report, where `Gradients.window` is not bound: three windows from a report's 48."""


@dataclass(frozen=True)
class Gradients:
    """Settings of the gradient statistics; the defaults are this project's choice unless a source is named.

    Attributes:
        block: block of the vision tower whose parameters are looked at, from 1; 0: the whole tower at once; None: the
            shallowest tapped one (the Skip-Links paper: "the first skip-link block", 6).
        full: what the full gradient is: "run", through the taps as the run has them (appendix C, "a standard forward
            and backward pass"), or "attached", as if no tap were detached: what `detach` keeps away from the block.
        every: measure every so many training steps.
        window: measured steps K of one window (appendix C.2 names no number).
        start: the first training step that is measured, from 1.
        steps: measure in so many training steps from there (the paper: 1300); None: until training ends.
        stop: the training step after which the run ends, with the warm-up and the learning rates of the whole run (the
            paper measures the first 1300 steps of a long one); None: the run goes on.
        transition_windows: the skip gradient counts as settled below the main one when it stays there for so many
            windows (appendix C.4: "for consecutive windows").
        smoothness: L of condition (7); None: only the product of L and the step size that it needs is reported.
        step_size: its step size, gamma; None: the learning rate of the run (of the measured block, where it trains).
        curvature: at a fixed checkpoint, also measure the curvature of the loss along both gradients, which is L of
            condition (7) where `smoothness` is None; the number is the distance gone from the weights, as a share of
            their norm, such as 0.001; None: not measured.
    """

    block: int | None = None
    full: str = RUN
    every: int = 1
    window: int = 50
    start: int = 1
    steps: int | None = None
    stop: int | None = None
    transition_windows: int = 3
    smoothness: float | None = None
    step_size: float | None = None
    curvature: float | None = None

    def __post_init__(self) -> None:
        choice("Gradients", "full", self.full, FULL)
        for name in ("every", "window", "start", "transition_windows", "block", "steps", "stop"):
            if name not in ("block", "steps", "stop") or getattr(self, name) is not None:
                integer("Gradients", name, getattr(self, name), {"window": 2, "block": 0}.get(name, 1))
        last = self.start + (self.steps or 1) - 1
        if self.stop is not None and self.stop < last:
            asked = f"start = {self.start}" + ("" if self.steps is None else f" and Gradients.steps = {self.steps}")
            raise SettingError(
                f"Gradients.stop = {self.stop} ends the run before step {last}, which Gradients.{asked} asks for: stop "
                "later or measure fewer steps"
            )
        for name in ("smoothness", "step_size", "curvature"):
            if (value := getattr(self, name)) is not None:
                number("Gradients", name, value, above=0)

    def measures(self, step: int) -> bool:
        """Whether a training step (from 1) is measured."""
        behind = step - self.start
        return behind >= 0 and behind % self.every == 0 and (self.steps is None or behind < self.steps)


def name_of(block: Any) -> str:
    """A measured block in words."""
    return "the whole tower" if block == TOWER else f"block {block}"


class GradientsMeasurement(Measurement):
    """Gradients of a vision block: what comes through skip taps, and what does not.

    Measures a fixed checkpoint; no weight moves. A training run is measured
    by a Gradients binding in its gin configuration: show draws what it wrote,
    table compares several runs.

    DATA needs answers: LLaVA's JSON or transcripts (default: rendered pages).
    A stock checkpoint has no skip taps: give it some, as in
    --gin-param "SkipLinks.stride = 2"; their weights are zero before they are
    trained, so that nothing passes them yet.

    OUTPUT gets gradients.json, gradients.png, and gradients.jsonl while it
    runs. Interrupted (Ctrl-C), the same command goes on.
    """

    name = "gradients"
    title = "Gradients at this checkpoint"
    about = (
        "What reaches a block of the vision tower through the skip taps, beside what comes through the main path, at "
        "the finished weights: no weight moves. Cosine below 0: the two pull apart. Delta: how far the two are from "
        "independent noise."
    )
    terms = {  # noqa: RUF012
        "detaching condition": "<m + s, s> <= (L gamma / 2) (E||g_full||² - E||g_main||²): then a step without "
        "the skip "
        "gradient is no worse in expectation. m and s are the mean main and skip gradient, gamma the step size, L the "
        "smoothness of the loss (Skip-Links paper, condition "
        "7).",
        "delta": "2 |E<g_main, g_skip> - <m, s>| / tr Sigma_skip: the share of the skip path's variance that "
        "both paths have "
        "in common (Skip-Links paper, equations 13 and 15; 0 for independent noise).",
        "variance": "tr Sigma = E||g||² - ||E g||² in a window of steps (Skip-Links paper, equations 12 and "
        "14); c is the "
        "skip path's over the main path's.",
        "t_trans": "The first step after which the running median of ||g_skip|| / ||g_main|| stays below 1 for "
        "transition_windows windows (Skip-Links paper, appendix C.4).",
    }
    alt = (
        "Four panels over the batches: squared norms of the skip and the main gradient, their variance in windows, "
        "their cosine, and their cross-covariance in windows."
    )
    settings = Gradients
    result = "llava_patch.measurements.gradients.result:GradientsResult"
    resumes = True
    gpu_dtype = "bfloat16"  # float16 gradients vanish without a loss scaler
    report_count = ""
    readers = ("LLaVA's training script",)
    hidden = ("every", "start", "steps", "stop", "transition_windows")
    aside = tuple(f"Gradients.{name}" for name in (*hidden, "smoothness", "step_size"))

    def check(self, data: str, samples: int | None, **options: Any) -> None:
        """Refuse too few batches."""
        for name, least in (("steps", 2), ("batch_size", 1)):
            if options[name] < least:
                raise SettingError(f"--{name.replace('_', '-')} {options[name]}: expected at least {least}")

    def report_settings(self, context: Any) -> Gradients:
        """A window that fits the report's batches, several times where Gradients.window is not bound."""
        asked = active.configuration()
        bound = asked is not None and Gradients.__name__ in asked.measurements
        window = active.settings_of(Gradients).window if bound else WINDOW
        settings: Gradients = active.settings_of(Gradients, window=max(2, min(window, context.settings.gradient_steps)))
        return settings

    def recorded(self, context: Any, settings: Gradients) -> dict[str, Any]:
        """Batches count too."""
        batches = {"batches": context.settings.gradient_steps, "examples a batch": BATCH}
        return {**batches, **dataclasses.asdict(settings)}

    def report_words(self, context: Any, settings: Gradients) -> list[str]:
        """As many batches as the section's."""
        return ["--steps", str(context.settings.gradient_steps), "--window", str(settings.window)]

    def why_not(self, context: Any) -> str | None:
        """Without taps there is no skip gradient."""
        asked = active.configuration()
        fusion = context.inspection.methods().get("fusion") or (None if asked is None else asked.fusion)
        if fusion is None or getattr(fusion, "layers", None) == ():  # SkipLinks(layers=()): a trained tower alone
            return "the model has no skip taps, so there is no skip gradient"
        return None

    def in_report(self, context: Any, settings: Gradients) -> "GradientsResult":
        """As many batches as the report says, or as the examples make."""
        from llava_patch.measurements.gradients.measure import make_batches, measure_gradients

        examples = context.examples(context.settings.gradient_steps * BATCH, answers=True)
        if len(examples) < 2 * BATCH:
            raise NothingToMeasure(f"{len(examples)} examples with answers, too few for two batches of {BATCH}")
        batches = make_batches(context.subject.inputs(), examples, BATCH)
        facts = {"checkpoint": named(context.checkpoint), "data": context.data or "rendered pages"}
        return measure_gradients(context.subject.model, batches, settings, None, facts)

    def measure(
        self,
        target: Target,
        settings: Gradients,
        folder: Path | None = None,
        *,
        steps: int = 16,
        batch_size: int = BATCH,
    ) -> "GradientsResult":
        """Measure some batches.

        Args:
            target: the checkpoint.
            settings: of the measurement; a window is at most all batches.
            folder: an unfinished run goes on from there; None: nothing is kept.
            steps: batches, each standing for a training step.
            batch_size: examples a batch; the noise depends on it, so take the run's own.
        """
        from llava_patch.data.loaded import pick_device
        from llava_patch.measurements.gradients.decompose import measured_block
        from llava_patch.measurements.gradients.measure import make_batches, measure_gradients

        if not target.dtype and pick_device(target.device) != "cpu":
            target.dtype = self.gpu_dtype
        model = target.subject.model
        measured_block(model, settings.block, settings.full)  # before data are read
        examples = target.examples(steps * batch_size, answers=True)
        batches = make_batches(target.subject.inputs(), examples, batch_size)
        if len(batches) < steps:
            print(f"{len(examples)} examples make {len(batches)} batches of {batch_size}")
        settings = dataclasses.replace(settings, window=min(settings.window, len(batches)))
        facts: dict[str, Any] = {"checkpoint": named(target.checkpoint), "base": target.below}
        facts |= {"data": target.data or "rendered pages", "question": target.question}
        texts = [(one.id, one.question, one.answer) for one in examples[: len(batches) * batch_size]]
        facts["examples"] = hashlib.sha256(repr(texts).encode()).hexdigest()  # files change under a name
        facts["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
        return measure_gradients(model, batches, settings, folder, facts)

    def make_way(self, folder: Path) -> None:
        """Delete the log of a finished measurement; a training run's, and an unfinished one's, are refused as ever."""
        from llava_patch.measurements.gradients.log import LOG
        from llava_patch.measurements.gradients.measure import is_finished

        if is_finished(folder / LOG):
            (folder / LOG).unlink()
