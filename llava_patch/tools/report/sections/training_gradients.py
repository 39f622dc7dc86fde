"""Gradient statistics that were measured while the checkpoint was trained."""

from __future__ import annotations

from pathlib import Path

from llava_patch.measurements.gradients.log import LOG
from llava_patch.measurements.gradients.result import NAME, GradientsResult
from llava_patch.tools.report.context import Context
from llava_patch.tools.report.section import Found, Section, found_of


def _place(context: Context) -> Path | None:
    """The run's folder, or the one in it, that holds gradient statistics."""
    for folder in (Path(context.run), Path(context.run) / NAME) if context.run else ():
        if (folder / LOG).is_file() or (folder / f"{NAME}.json").is_file():
            return folder
    return None


def _run(context: Context, folder: Path) -> Found:
    place = _place(context)
    assert place is not None
    result = GradientsResult.read(place)
    return found_of(
        result,
        folder,
        "training_gradients",
        "Four panels over the training steps: squared norms of the skip and the main gradient, their variance in "
        "windows, their cosine, and their cross-covariance in windows.",
    )


def _why_not(context: Context) -> str | None:
    if not context.run:
        return "no training run known: give the folder of one that was measured (a Gradients binding) as --run"
    if _place(context) is None:
        return f"{context.run} holds no gradient statistics: train with a field of Gradients bound to measure them"
    return None


def _inputs(context: Context) -> list[str]:
    place = _place(context)
    return [] if place is None else [str(place / LOG), str(place / f"{NAME}.json")]


SECTION = Section(
    "training_gradients",
    "Gradients during training",
    "The same while the weights moved: does the skip gradient settle below the main one (t_trans), and do the two "
    "agree?",
    _run,
    why_not=_why_not,
    inputs=_inputs,
    command=lambda context: f"llava-patch gradients show {context.run}" if context.run else "",
)
