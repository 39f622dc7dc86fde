"""The training run's own curves, from Trainer's trainer_state.json."""

from __future__ import annotations

import json
from pathlib import Path

from llava_patch.core import plotting
from llava_patch.core.errors import InputError
from llava_patch.core.files import write_json
from llava_patch.measurements.base import NothingToMeasure
from llava_patch.tools.report.context import Context
from llava_patch.tools.report.section import Figure, Found, Section, Table

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


def _run(context: Context, folder: Path) -> Found:
    curves = read_curves(context.run)
    losses = curves["loss"]
    if not losses:
        raise NothingToMeasure(f"{Path(context.run) / STATE} has no logged loss")
    draw(curves, folder / "training.png")
    write_json(folder / "training.json", {name: [list(pair) for pair in pairs] for name, pairs in curves.items()})
    tail = losses[-max(1, len(losses) // 10) :]
    last = sum(value for _, value in tail) / len(tail)
    summary = f"Training loss went from {losses[0][1]:.3f} to {last:.3f} over {losses[-1][0]} optimizer steps."
    rows: list[list[str]] = []
    for name, label in CURVES:
        values = [value for _, value in curves[name]]
        if values:
            rows.append([label, *(f"{v:.4g}" for v in (values[0], values[-1], min(values), max(values)))])
    names = ", ".join(row[0] for row in rows)
    return Found(
        summary,
        [Figure("training.png", f"Curves over the optimizer steps: {names}. {summary}")],
        [Table(["curve", "first", "last", "lowest", "highest"], rows)],
        ["training.json", "training.png"],
    )


def _why_not(context: Context) -> str | None:
    if not context.run:
        return f"no training run known: give its folder, with {STATE}, as --run"
    return None if (Path(context.run) / STATE).is_file() else f"{context.run} holds no {STATE}"


def _inputs(context: Context) -> list[str]:
    return [str(Path(context.run) / STATE)] if context.run else []


SECTION = Section(
    "training",
    "Training curves",
    "What Hugging Face's Trainer logged during the run. The last loss is the mean over the last tenth of the log.",
    _run,
    why_not=_why_not,
    inputs=_inputs,
)
