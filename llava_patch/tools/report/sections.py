"""The sections of a report: how one is made, what is kept of it, and all of them.

There is one for each measurement of the registry, for what a training run left, and for R-Probe's results, which were
measured before: a probe takes longer than a report. Models are loaded when the first section asks for them.
"""

import contextlib
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import variance
from typing import Any

import torch

from llava_patch.core import plotting, registry
from llava_patch.core.errors import InputError, LlavaPatchError
from llava_patch.core.files import atomic, write_json
from llava_patch.core.paths import named
from llava_patch.core.stored import field as field_of
from llava_patch.core.stored import is_finite, read_object
from llava_patch.core.weights import folder_of
from llava_patch.data.examples import Example
from llava_patch.data.loaded import base_of, pick_device
from llava_patch.data.target import Target
from llava_patch.measurements import base as protocol
from llava_patch.measurements.base import DAMAGED, Measurement, NothingToMeasure, decode
from llava_patch.measurements.gradients.log import LOG
from llava_patch.measurements.gradients.measurement import GradientsMeasurement
from llava_patch.measurements.gradients.result import NAME, GradientsResult
from llava_patch.measurements.rprobe import ablation
from llava_patch.measurements.rprobe.ablation import SUMMARY
from llava_patch.measurements.rprobe.output import RESULT
from llava_patch.measurements.rprobe.result import RProbeResult
from llava_patch.tools.inspect import Inspection, inspect_checkpoint
from llava_patch.tools.report.settings import Report

DONE, SKIPPED, FAILED = "done", "skipped", "failed"
STATE = "trainer_state.json"
CURVES = (("loss", "loss (nats per token)"), ("learning_rate", "learning rate"), ("grad_norm", "gradient norm"))
MAPS = 3  # error maps of R-Probe that are shown


@dataclass(frozen=True)
class Figure:
    """A picture."""

    file: str  # its name in the report's folder
    alt: str  # what it shows, in words


@dataclass(frozen=True)
class Table:
    """A table of text."""

    head: list[str]  # column titles
    rows: list[list[str]]
    caption: str = ""
    folded: bool = False  # shown on demand only


@dataclass(frozen=True)
class Found:
    """What a section measured."""

    summary: str  # the numbers, in a sentence or two
    figures: list[Figure] = field(default_factory=list)  # pictures, in order
    tables: list[Table] = field(default_factory=list)  # tables, in order
    files: list[str] = field(default_factory=list)  # names of the results' files in the report's folder
    finding: str = ""  # one sentence that a reader can act on; "": the summary says it
    caution: str = ""  # what the finding does not say; "": nothing


@dataclass(eq=False)
class Context(Target):
    """One checkpoint that a report is about.

    Its data type is float32 on CPU, and bfloat16 on a GPU that has it, unless another one is asked for.
    """

    rprobe: str = ""  # folder of R-Probe results; "": none
    run: str = ""  # folder of the training run; "": none
    settings: Report = field(default_factory=Report)  # sample counts
    gin: Sequence[str] = ()  # gin options of the command line, which commands that repeat a section need as well

    def __post_init__(self) -> None:
        if not self.dtype and pick_device(self.device) != "cpu" and torch.cuda.is_bf16_supported():
            self.dtype = "bfloat16"  # whose gradients do not vanish as float16's do
        self.folder = folder_of(self.checkpoint, download=True)  # where the checkpoint's files are
        base = self.base and folder_of(self.base, download=True, setting="--base")
        self.inspection: Inspection = inspect_checkpoint(self.folder, base)
        recorded = self.inspection.base
        if not self.base and recorded and Path(recorded).is_dir():
            with contextlib.suppress(LlavaPatchError):  # no LLaVA: a run that began with a plain LLM names that
                self.base = inspect_checkpoint(recorded).checkpoint
        self.below = self.base if self.inspection.form in ("lora", "projector") else ""
        self.run = self.run or (self.folder if (Path(self.folder) / "trainer_state.json").is_file() else "")

    def why_no_base(self) -> str | None:
        """Why there is nothing to compare with; None where there is."""
        if not self.base:
            return "no base to compare with: give the model it was trained from as --base"
        try:
            base_of(self.checkpoint, self.base, "--base")
        except LlavaPatchError as error:
            return f"the base is no LLaVA: {error}"
        return None

    def examples(self, count: int | None, answers: bool = False) -> list[Example]:
        """Examples spread evenly over the data."""
        try:
            return super().examples(count, answers)
        except InputError as error:
            if not answers:
                raise
            raise NothingToMeasure(str(error)) from error

    def command(self, *words: str, base: bool = False, data: bool = True) -> str:
        """A command line of ours about this checkpoint."""
        parts = ["llava-patch", *words[0].split(), self.checkpoint, *([self.data] if data and self.data else [])]
        parts += words[1:]
        options = {"--base": self.base if base else self.below, "--question": self.question if data else ""}
        for option, value in (options | {"--device": self.device, "--dtype": self.dtype}).items():
            parts += [option, value] if value else []
        return shlex.join([*parts, *self.gin])


@dataclass(frozen=True)
class Section:
    """How a section is made."""

    name: str  # in `--only`, `--skip` and file names
    title: str  # its heading
    about: str  # what is measured, and how to read it
    # measures, writes files into a folder, raises `NothingToMeasure` where there is nothing to measure
    run: Callable[[Context, Path], Found]
    # JSON values that the result depends on, beside checkpoint, base and data
    settings: Callable[[Context], dict[str, Any]] = lambda context: {}
    # the command that repeats it alone; "" where the report is the only way
    command: Callable[[Context], str] = lambda context: ""
    # why it cannot be made, found out before anything is loaded; None: it can
    why_not: Callable[[Context], str | None] = lambda context: None
    inputs: Callable[[Context], list[str]] = lambda context: []  # further files or folders that the result depends on
    # whether the command makes what a skipped section lacks; otherwise it would end as the section did
    supplies: bool = False
    terms: dict[str, str] = field(default_factory=dict)  # what is explained at the page's end, by name


@dataclass(frozen=True)
class Record:
    """What is kept of a section."""

    name: str
    title: str
    about: str
    state: str  # "done", "skipped" or "failed"
    reason: str = ""  # why it was skipped, or how it failed
    trace: str = ""  # of a failure
    found: Found | None = None  # what was measured; None when it was skipped or failed
    settings: dict[str, Any] = field(default_factory=dict)  # what it was measured with
    command: str = ""  # repeats it alone; "" where it was skipped and that cannot work either
    key: str = ""  # changes when checkpoint, base, data, settings or version do
    seconds: float = 0.0


def found_of(
    result: protocol.Result, folder: Path, name: str, alt: str, tables: Sequence[tuple[str, protocol.Table]]
) -> Found:
    """What a measurement's result gives a section: it is saved, and its summary, figure and tables are shown."""
    paths, summary = result.save(folder, name), result.summary()
    figures = [Figure(path.name, f"{alt} {summary}") for path in paths if path.suffix == ".png"]
    shown = [Table(*table, caption) for caption, table in tables]
    return Found(summary, figures, shown, [path.name for path in paths], result.finding(), result.caution())


def sections() -> list[Section]:
    """All of them, in the report's order."""
    measured = [_section_of(registry.measurement(name)) for name in registry.MEASUREMENTS]
    return [*measured, GRADIENTS, TRAINING, RPROBE]


def _section_of(measurement: Measurement) -> Section:
    """The section of a measurement; results of the command and of the section are written alike."""

    def run(context: Context, folder: Path) -> Found:
        result = measurement.in_report(context, measurement.report_settings(context))
        return found_of(result, folder, measurement.name, measurement.alt, measurement.report_tables(result))

    def recorded(context: Context) -> dict[str, Any]:
        return measurement.recorded(context, measurement.report_settings(context))

    def command(context: Context) -> str:
        words = measurement.report_words(context, measurement.report_settings(context))
        takes_data = measurement.samples is not None and not measurement.several
        return context.command(measurement.command, *words, base=measurement.compares, data=takes_data)

    about, why_not, terms = measurement.about, measurement.why_not, measurement.terms
    return Section(measurement.name, measurement.title, about, run, recorded, command, why_not, terms=terms)


def read_curves(run: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) pairs by name, in order of steps."""
    path = Path(run) / STATE
    advice = ": give the folder of another checkpoint of the run as --run, or leave the section out (--skip training)"
    history = field_of(read_object(path, InputError, advice), "log_history", list, path, InputError)
    try:
        return {
            name: [(decode(int, e["step"]), float(e[name])) for e in history if is_finite(e.get(name))]
            for name, _ in CURVES
        }
    except DAMAGED as error:
        raise InputError(f"{path}: cannot be read as a Trainer's state ({error!r}){advice}") from error


def _run_curves(context: Context, folder: Path) -> Found:
    curves = read_curves(context.run)
    losses = curves["loss"]
    if not losses:
        raise NothingToMeasure(f"{Path(context.run) / STATE} has no logged loss")
    write_json(folder / "training.json", curves)
    tail = losses[-max(1, len(losses) // 10) :]
    last = sum(value for _, value in tail) / len(tail)
    summary = f"Training loss went from {losses[0][1]:.3f} to {last:.3f} over {losses[-1][0]} optimizer steps."
    there, rows = [(label, curves[name]) for name, label in CURVES if curves[name]], []
    figure, axes = plotting.panel_grid(len(there), columns=2)
    for axis, (label, curve) in zip(axes, there, strict=True):
        steps, values = zip(*curve, strict=True)
        axis.plot(steps, values, color=plotting.TEXT, marker="o" if len(steps) < 30 else "", ms=2.5)
        axis.set(xlabel="optimizer step", ylabel=label, title=label.split(" (")[0].capitalize())
        rows.append([label, *(f"{v:.4g}" for v in (values[0], values[-1], min(values), max(values)))])
    plotting.write_figure(figure, folder / "training.png")
    alt = f"Curves over the optimizer steps: {', '.join(row[0] for row in rows)}. {summary}"
    table = Table(["curve", "first", "last", "lowest", "highest"], rows)
    files, caution = (
        ["training.json", "training.png"],
        "The training loss says nothing of answers: judge them on a task.",
    )
    return Found(summary, [Figure("training.png", alt)], [table], files, _trend([v for _, v in losses]), caution)


def _trend(losses: list[float]) -> str:
    """Whether the loss still falls: the last fifth of the log against the fifth before it, by two standard errors."""
    count = len(losses) // 5
    if count < 2:
        return "Undecided: too few losses were logged to tell whether the run had ended falling."
    before, last = losses[-2 * count : -count], losses[-count:]
    gap = sum(before) / count - sum(last) / count
    error = 2 * (sum(variance(part) for part in (before, last)) / count) ** 0.5
    between = f"by {gap:.3g} ± {error:.2g} over its last fifth"
    if gap > error:
        return f"The loss was still falling when the run ended ({between}): a longer run may lower it further."
    if gap < -error:
        return (
            f"The loss was rising when the run ended ({between}): look at the learning rate and at earlier checkpoints."
        )
    return f"The loss had levelled off when the run ended ({between})."


def _why_no_curves(context: Context) -> str | None:
    if not context.run:
        return f"no training run known: give its folder, with {STATE}, as --run"
    return None if (Path(context.run) / STATE).is_file() else f"{context.run} holds no {STATE}"


TRAINING = Section(
    "training",
    "Training curves",
    "What Hugging Face's Trainer logged during the run. The last loss is the mean over the last tenth of the log.",
    _run_curves,
    why_not=_why_no_curves,
    inputs=lambda context: [str(Path(context.run) / STATE)] if context.run else [],
)


def _gradient_files(context: Context) -> list[str]:
    """Where gradient statistics are kept, in the run's folder or the one in it; []: there are none."""
    for folder in (Path(context.run), Path(context.run) / NAME) if context.run else ():
        files = [folder / LOG, folder / f"{NAME}.json"]
        if any(path.is_file() for path in files):
            return [str(path) for path in files]
    return []


def _run_gradients(context: Context, folder: Path) -> Found:
    result = GradientsResult.read(Path(_gradient_files(context)[0]).parent)
    alt = (
        "Four panels over the training steps: squared norms of the skip and the main gradient, their variance in "
        "windows, their cosine, and their cross-covariance in windows."
    )
    return found_of(result, folder, "training_gradients", alt, [("", result.table())])


def _why_no_gradients(context: Context) -> str | None:
    if not context.run:
        return "no training run known: give the folder of one that was measured (a Gradients binding) as --run"
    if not _gradient_files(context):
        return f"{context.run} holds no gradient statistics: train with a field of Gradients bound to measure them"
    return None


GRADIENTS = Section(
    "training_gradients",
    "Gradients during training",
    "The same while the weights moved: does the skip gradient settle below the main one (t_trans), and do the two "
    "agree?",
    _run_gradients,
    why_not=_why_no_gradients,
    inputs=_gradient_files,
    command=lambda context: f"llava-patch gradients show {context.run}" if context.run else "",
    terms=GradientsMeasurement.terms,
)


def _run_rprobe(context: Context, folder: Path) -> Found:
    source = Path(context.rprobe)
    if (source / SUMMARY).is_file():
        return _ablation(source, folder, context)
    result = RProbeResult.load(source / RESULT)
    _check(result.facts.get("checkpoint"), context, source / RESULT)
    figures, files = _copied(source, folder, "rprobe")
    rows = [
        ["MSE", f"{result.mse:.4f}", f"{result.constant_mse:.4f}"],
        ["FVU", f"{result.fvu:.3f}", f"{result.constant_fvu:.3f}"],
        ["PSNR (dB)", f"{result.psnr:.1f}", ""],
    ]
    tables = [Table(["held out", "the probe", "a constant patch"], rows)]
    return Found(result.summary(), figures, tables, files, result.finding(), result.caution())


def _ablation(source: Path, folder: Path, context: Context) -> Found:
    advice = ": measure again, or give another folder as --rprobe"
    values = read_object(source / SUMMARY, InputError, advice)
    try:
        found = [Table(head, rows) for head, rows in ablation.tables(values)]
        finding = ablation.finding(values)
        said = ablation.notes(values) or ["R-Probe with the region seen or masked, and with its text or without."]
    except DAMAGED as error:
        raise InputError(f"{source / SUMMARY}: cannot be read as R-Probe's ablation ({error!r}){advice}") from error
    _check(values.get("checkpoint"), context, source / SUMMARY)
    figures: list[Figure] = []
    files: list[str] = []
    for part in sorted(p.parent for p in source.glob(f"*/{RESULT}")):
        more, names = _copied(part, folder, f"rprobe-{part.name}")
        figures, files = figures + more[:1], files + names
    return Found(" ".join(said), figures, found, files, finding)


def _copied(source: Path, folder: Path, name: str) -> tuple[list[Figure], list[str]]:
    """Copy result and figures into the report's folder, which must not need the probe's."""
    figures, files = [], []
    alt = {"rprobe": "R-Probe: training curve, and regions as they are and as they were rebuilt."}
    pictures = [p for p in (source / "rprobe.png", *sorted(source.glob("map-*.png"))[:MAPS]) if p.is_file()]
    for path in (source / RESULT, *pictures):
        kept = f"{name}{path.suffix}" if path.stem == "rprobe" else f"{name}-{path.name}"
        with atomic(folder / kept) as part:
            shutil.copyfile(path, part)
        files.append(kept)
        if path.suffix == ".png":
            figures.append(Figure(kept, alt.get(path.stem, "R-Probe: error map of a held-out page.")))
    return figures, files


def _check(measured: Any, context: Context, path: Path) -> None:
    if isinstance(measured, str) and named(measured) != named(context.checkpoint):
        raise NothingToMeasure(f"{path} was measured on {measured}, another checkpoint")


def _rprobe_files(context: Context) -> list[str]:
    return [str(Path(context.rprobe) / name) for name in (RESULT, SUMMARY)] if context.rprobe else []


def _why_no_rprobe(context: Context) -> str | None:
    if not context.rprobe:
        return "no results given: measure with llava-patch rprobe CKPT, then give the folder as --rprobe"
    there = any(Path(path).is_file() for path in _rprobe_files(context))
    return None if there else f"{context.rprobe} holds neither {RESULT} nor {SUMMARY}"


RPROBE = Section(
    "rprobe",
    "R-Probe",
    "Did the model see it, or did it not say? A small decoder rebuilds the pixels under text regions from the "
    "projected tokens; what it cannot rebuild, the language model cannot read. Lower is better.",
    _run_rprobe,
    command=lambda context: context.command("rprobe"),
    why_not=_why_no_rprobe,
    inputs=_rprobe_files,
    supplies=True,
    terms={
        "MSE": "Mean squared error in the image processor's normalised pixels: mean inside a token, then over all "
        "target tokens.",
        "FVU": "Fraction of variance unexplained: MSE / variance of the held-out targets about their mean patch.",
        "PSNR": "Peak signal-to-noise ratio in dB, of pixels as they are shown.",
    },
)
