"""Gradient statistics at one fixed checkpoint: what the gradients would be if training went on from it now."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.core import files
from llava_patch.core.errors import CheckpointError, InputError
from llava_patch.core.terminal import counted, say_cost
from llava_patch.data.examples import Example
from llava_patch.data.inputs import IGNORED, Inputs
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.gradients.curvature import bends
from llava_patch.measurements.gradients.decompose import block_parameters, decompose, measured_block
from llava_patch.measurements.gradients.log import LOG, READING, StepLog, read_lines
from llava_patch.measurements.gradients.measurement import Gradients
from llava_patch.measurements.gradients.moments import Moments, Step
from llava_patch.measurements.gradients.result import GradientsResult
from llava_patch.measurements.gradients.statistics import STATE, Window
from llava_patch.measurements.passes import keeping_flags
from llava_patch.patching.handle import get_handle
from llava_patch.patching.keys import model_digest

DEFAULTS = Gradients()
SAVE_EVERY = 30.0  # seconds between two states of an unfinished window
Batch = Sequence[Callable[[], Mapping[str, Any]]]
_MEANING = {"model": "another model (weights, configuration or patch)", "examples": "other examples"}


def make_batches(inputs: Inputs, examples: Sequence[Example], size: int) -> list[Batch]:
    """Batches of examples with answers for `measure_gradients`; images are opened when their turn comes.

    Args:
        inputs: makes the model's inputs.
        examples: with their answers; what does not fill a batch is left out.
        size: examples a batch.

    Raises:
        InputError: too few for two batches, without which there is no variance.
    """
    if len(examples) < 2 * size:
        raise InputError(
            f"{len(examples)} examples are too few for two batches of {size}: lower --batch-size, or give more data"
        )

    def inputs_of(example: Example) -> dict[str, Any]:
        return inputs.of(example, answers=True)

    makers = [functools.partial(inputs_of, example) for example in examples]
    return [makers[i : i + size] for i in range(0, len(makers) - size + 1, size)]


def measure_gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    settings: Gradients = DEFAULTS,
    folder: str | Path | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> GradientsResult:
    """Measure the gradients of a patched model on some batches; no weight moves.

    Each batch stands for a training step of that batch size. Its examples pass one at a time, and their losses are
    weighted by their scored tokens, as the mean over a padded batch is. The model runs in training mode, everything but
    the measured block frozen meanwhile, which saves memory; the generators are seeded with the batch's number, so that
    dropout is the same in a measurement that goes on.

    With `settings.curvature`, the curvature along each batch's gradients is measured on the batch after it (the first,
    after the last): four more forward and backward passes an example. One batch alone has none.

    Args:
        model: a patched host model with a loaded tower.
        batches: each a list of functions that give the keyword arguments of the model's forward for one example, with
            `labels`, on the model's device (a function, so that images are opened when they are needed).
        settings: `every`, `start` and `steps` have no meaning here.
        folder: results of single batches go there as they come (see `StepLog`), and a measurement that was interrupted
            goes on, on the same model and examples. A finished one of the same checkpoint and patch makes way for other
            settings or facts; a training run's log never does. None: nothing is written.
        facts: plain values to keep with the result, such as "checkpoint"; a folder with an unfinished measurement with
            other facts is refused.
        progress: show a progress bar on stderr.

    Raises:
        SettingError: see `measured_block`.
        InputError: no batches, an example without labels, or one from which no gradient reaches the block.
        CheckpointError: the folder holds another measurement.
    """
    block = measured_block(model, settings.block, settings.full)
    block_parameters(model, block)
    if not batches:
        raise InputError("gradient statistics need at least one batch of examples")
    handle = get_handle(model)
    assert handle is not None
    about = {
        "block": block, "fusion": str(handle.fusion), "routing": str(handle.routing or ""),
        "batch": len(batches[0]), "batches": len(batches), "trains": False, **dict(facts or {}),
    }  # fmt: skip
    device = next(find(model).projector.parameters()).device
    log, window = None, Window(settings.window)
    if folder is not None:
        folder = Path(folder)
        log, unfinished = _start(folder, settings, files.plain({**about, "model": model_digest(find(model))}), device)
        if unfinished is None:
            return GradientsResult.read(folder)  # complete already
        window = unfinished
    steps: list[Step] = []
    windows: list[Moments] = []
    saved, noted = time.monotonic(), window.last
    what = f"{counted(len(batches) - noted, 'batch', 'batches')} of {counted(len(batches[0]), 'example')}"
    more = "and its curvature" if settings.curvature is not None and len(batches) > 1 else ""
    say_cost("gradients", what, "two forward and two backward passes an example", more, shown=progress)
    try:
        with keeping_flags(model):
            model.train().requires_grad_(False)
            for number, batch in files.track(list(enumerate(batches, 1))[noted:], "gradients", progress):
                with seeded(number, device):
                    main, full = _gradients(model, batch, block, settings.full)
                bent = None
                if settings.curvature is not None and len(batches) > 1:
                    with seeded(number, device):
                        other = batches[number % len(batches)]
                        bent = _bends(model, other, block, (full, main), settings.curvature)
                step, moments = window.add(number, main, full, bends=bent)
                steps.append(step)
                windows += [] if moments is None else [moments]
                if log is not None:
                    log.add(step, moments)
                    noted = number
                    if time.monotonic() - saved > SAVE_EVERY:
                        window.save(log.path.parent / STATE)
                        saved = time.monotonic()
    finally:
        if log is not None and 0 < noted < len(batches) and window.last == noted:
            window.save(log.path.parent / STATE)
    if log is None:
        return GradientsResult(steps, windows, settings, facts=files.plain(about))
    (log.path.parent / STATE).unlink(missing_ok=True)
    return GradientsResult.read(log.path.parent)


def is_finished(path: Path) -> bool:
    """Whether a log is that of a fixed checkpoint in which all was measured."""
    if not path.exists():
        return False
    header, *entries = read_lines(path)
    return header["facts"].get("trains") is False and _done(entries) == header["facts"].get("batches")


def _done(entries: Sequence[dict[str, Any]]) -> int:
    return max((entry["step"] for entry in entries if entry["kind"] == "step"), default=0)


def _start(
    folder: Path, settings: Gradients, facts: dict[str, Any], device: torch.device
) -> tuple[StepLog, Window | None]:
    """Where the steps are noted, and the window that comes next; (log, None) when all has been measured before."""
    path = folder / LOG
    nothing: list[dict[str, Any]] = [{"facts": {"trains": False}}]
    header, *entries = read_lines(path) if path.exists() else nothing
    about = header["facts"]
    differing = [name for name in {**about, **facts} if about.get(name) != facts.get(name)]
    done = _done(entries)
    # A log in which nothing was measured, or all of it, makes way; a training run's never does.
    whole = done == about.get("batches") and _asks_otherwise(header, settings, facts)
    if about.get("trains") is False and (not entries or whole):
        return StepLog(folder, settings, facts), Window(settings.window)
    if differing:
        name = differing[0]
        what = f"with {name} = {about.get(name)!r}, not {facts.get(name)!r}"
        what = f"of {_MEANING[name]}" if name in _MEANING else what
        raise CheckpointError(f"{path} holds a measurement {what}: give another folder (--output), or delete this one")
    if done == facts["batches"]:
        return StepLog.resume(folder, settings, done), None
    if not (folder / STATE).exists():  # ended before the first state was written
        return StepLog(folder, settings, facts), Window(settings.window)
    window = Window.load(folder / STATE, settings.window, device)
    return StepLog.resume(folder, settings, window.last), window


def _asks_otherwise(header: dict[str, Any], settings: Gradients, facts: dict[str, Any]) -> bool:
    """Whether a log is of the same checkpoint and patch, measured with other settings or facts."""
    about, name = header["facts"], "checkpoint" if "checkpoint" in facts else "model"
    same = all(about.get(what) == facts.get(what) for what in (name, "fusion", "routing"))
    was, now = ({k: v for k, v in s.items() if k not in READING} for s in (header["settings"], asdict(settings)))
    return same and (about != facts or was != now)


def _gradients(model: nn.Module, batch: Batch, block: int, full: str) -> tuple[Tensor, Tensor]:
    """Main and full gradient of a batch's mean loss over its scored tokens."""
    sums: Tensor | None = None
    total = 0
    for inputs, scored in map(_scored, batch):
        parts = torch.stack(decompose(model, functools.partial(_loss, model, inputs), block, full)) * scored
        sums = parts if sums is None else sums + parts
        total += scored
    if sums is None:
        raise InputError("gradient statistics: a batch without examples")
    main, both = sums / total
    return main, both


def _bends(
    model: nn.Module, batch: Batch, block: int, directions: tuple[Tensor, Tensor], share: float
) -> tuple[float, float]:
    """<g, H g> of both gradients, H being the Hessian of a batch's mean loss over its scored tokens."""
    total, sums = 0, [0.0, 0.0]
    for inputs, scored in map(_scored, batch):
        found = bends(model, functools.partial(_loss, model, inputs), block, directions, share)
        sums = [before + scored * one for before, one in zip(sums, found, strict=True)]
        total += scored
    return sums[0] / total, sums[1] / total


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers that begin at a seed; the generators come back as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _scored(example: Callable[[], Mapping[str, Any]]) -> tuple[dict[str, Any], int]:
    """An example's inputs, and how many of its tokens the loss is a mean of."""
    inputs = {"use_cache": False, **example()}
    labels = inputs.get("labels")
    scored = 0 if labels is None else int((labels[:, 1:] != IGNORED).sum())
    if not scored:
        raise InputError("gradient statistics need the loss: an example has no labels, or no scored token")
    return inputs, scored


def _loss(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    outputs = model(**inputs)
    loss: Tensor = outputs.loss if hasattr(outputs, "loss") else outputs[0]
    return loss
