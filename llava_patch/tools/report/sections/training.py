"""What a training run left: the Trainer's own curves, and gradient statistics where they were measured."""

from __future__ import annotations

import json
from pathlib import Path

from llava_patch.core import plotting
from llava_patch.core.errors import InputError
from llava_patch.core.files import write_json
from llava_patch.measurements.base import NothingToMeasure
from llava_patch.measurements.gradients.log import LOG
from llava_patch.measurements.gradients.result import NAME, GradientsResult
from llava_patch.tools.report.context import Context
from llava_patch.tools.report.section import Figure, Found, Section, Table, found_of

STATE = "trainer_state.json"
CURVES = (("loss", "loss (nats per token)"), ("learning_rate", "learning rate"), ("grad_norm", "gradient norm"))


def read_curves(run: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) pairs by name, in order of steps."""
    path = Path(run) / STATE
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        return {
            name: [(int(e["step"]), float(e[name])) for e in history if isinstance(e.get(name), (int, float))]
            for name, _ in CURVES
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read as a Trainer's state ({error})") from error


def draw(curves: dict[str, list[tuple[int, float]]], path: Path) -> Path:
    """One panel for each curve that has values."""
    there = [(name, label) for name, label in CURVES if curves[name]]
    figure, axes = plotting.panels(1, len(there))
    for axis, (name, label) in zip(axes, there, strict=True):
        steps, values = zip(*curves[name], strict=True)
        axis.plot(steps, values, color=plotting.TEXT, marker="o" if len(steps) < 30 else "", ms=2.5)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(label)
        axis.set_title(label.split(" (")[0].capitalize())
    return plotting.write_figure(figure, path)


def _run_curves(context: Context, folder: Path) -> Found:
    curves = read_curves(context.run)
    losses = curves["loss"]
    if not losses:
        raise NothingToMeasure(f"{Path(context.run) / STATE} has no logged loss")
    draw(curves, folder / "training.png")
    write_json(folder / "training.json", curves)
    tail = losses[-max(1, len(losses) // 10) :]
    last = sum(value for _, value in tail) / len(tail)
    summary = f"Training loss went from {losses[0][1]:.3f} to {last:.3f} over {losses[-1][0]} optimizer steps."
    rows: list[list[str]] = []
    for name, label in CURVES:
        values = [value for _, value in curves[name]]
        if values:
            rows.append([label, *(f"{v:.4g}" for v in (values[0], values[-1], min(values), max(values)))])
    alt = f"Curves over the optimizer steps: {', '.join(row[0] for row in rows)}. {summary}"
    table = Table(["curve", "first", "last", "lowest", "highest"], rows)
    return Found(summary, [Figure("training.png", alt)], [table], ["training.json", "training.png"])


def _why_no_curves(context: Context) -> str | None:
    if not context.run:
        return f"no training run known: give its folder, with {STATE}, as --run"
    return None if (Path(context.run) / STATE).is_file() else f"{context.run} holds no {STATE}"


SECTION = Section(
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
)
