"""Gradient statistics while a Trainer of transformers trains, LLaVA's included; what it trains stays bit for bit.

Source: "Detached Skip-Links and R-Probe", appendix C.1 ("Online Measurement Strategy").
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.core.extras import need
from llava_patch.core.files import atomic
from llava_patch.core.undo import UndoStack
from llava_patch.integrations.training.gradients_check import check
from llava_patch.integrations.training.gradients_loss import caught_loss, loss_scale, unnoticed
from llava_patch.integrations.training.learning_rate import learning_rate
from llava_patch.measurements.gradients import state as saved
from llava_patch.measurements.gradients.decompose import block_parameters, decompose
from llava_patch.measurements.gradients.log import LOG, StepLog
from llava_patch.measurements.gradients.moments import Step
from llava_patch.measurements.gradients.result import NAME, GradientsResult
from llava_patch.measurements.gradients.settings import Gradients
from llava_patch.measurements.gradients.statistics import Window
from llava_patch.patching.handle import get_handle

logger = logging.getLogger("llava_patch")


def follow(trainer: Any, settings: Gradients | None = None) -> "Following":
    """Measure gradient statistics in a Trainer's runs; call it once, before `train()`.

    LLaVA's own training script does it where a field of `Gradients` is bound.

    A measured step costs two more forward and backward passes of its micro-batches, of which the backward passes give
    no weight but the measured block's a gradient. Weights, losses, gradient norms and learning rates are those of a run
    without it, bit for bit. With several ranks, micro-batches or both, gradients are averaged as training averages
    them, before they are clipped. In float16 the loss is scaled as training scales it, and the scale taken off again.

    Writes gradients.jsonl (a line a measured step), gradients.json and gradients.png into OUTPUT_DIR/gradients, its
    unfinished window into each checkpoint, and grad_main_norm, grad_skip_norm and grad_cos (means of the measured steps
    since the last line) into the Trainer's log.

    Modifications, from the beginning of a run to its end: the Trainer's instance attributes `training_step` and `log`;
    for good its `_load_optimizer_and_scheduler`, which says what a run is resumed from.

    Args:
        trainer: a Trainer whose model is patched with a fusion that has taps.
        settings: of the measurement.

    Returns:
        What follows the run; its `result` is there on the first rank once a step was measured.

    Raises:
        SettingError: no taps, no gradient through them, a block that is not there, or a kind of training (ZeRO-3, FSDP,
            nn.DataParallel, compiled models) in which this does not work.
        HostError: a tower that is not loaded or has only quantised weights.
        MissingExtraError: no matplotlib.
    """
    need("Gradients", "figures")  # the run ends with a figure: not found out then
    chosen = Gradients() if settings is None else settings
    following = Following(trainer, chosen, check(trainer.model, trainer.args, chosen))
    trainer.add_callback(_callback(following))
    return following


class Following:
    """One Trainer's measurement.

    Attributes:
        settings: of the measurement.
        block: number of the measured block of the vision tower, from 1.
    """

    def __init__(self, trainer: Any, settings: Gradients, block: int) -> None:
        """Use `follow`, not this."""
        self.settings = settings
        self.block = block
        self._trainer = trainer
        self._undo = UndoStack()
        self._resumed: Path | None = None
        self._window = Window(settings.window)
        self._log: StepLog | None = None
        self._sums: Tensor | None = None
        self._rate: float | None = None
        self._measuring = False
        self._unlogged: list[Step] = []
        load = trainer._load_optimizer_and_scheduler

        @functools.wraps(load)
        def note_and_load(checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
            self._resumed = None if checkpoint is None else Path(checkpoint)
            return load(checkpoint, *args, **kwargs)

        trainer._load_optimizer_and_scheduler = note_and_load

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return Path(self._trainer.args.output_dir) / NAME

    @property
    def result(self) -> GradientsResult:
        """What was measured so far, in earlier parts of a resumed run too; on any rank that sees the folder.

        Raises:
            CheckpointError: no run has begun.
        """
        return GradientsResult.read(self.folder)

    # --- called by the callback ---------------------------------------------------------------------------------------

    def begin(self, state: Any) -> None:
        """Begin with a run, or go on with one that is resumed."""
        self._undo.unwind()  # of a run that was broken off
        self._sums, self._measuring, self._unlogged = None, False, []
        self._wrap_training_step()
        if not self._trainer.is_world_process_zero():
            return
        self._wrap_log()
        self._warn(state.max_steps)
        if not self._go_on(state.global_step):
            self._window = Window(self.settings.window)
            self._log = StepLog.begin(self.folder, self.settings, self._facts())

    def begin_step(self, step: int) -> None:
        """Say which training step comes, from 1."""
        self._measuring = self.settings.measures(step)
        self._sums = None
        if self._measuring:
            self._rate = learning_rate(self._trainer, self._parameters())

    def end_step(self, step: int) -> None:
        """Put the step's micro-batches and ranks together."""
        if not self._measuring or self._sums is None:
            return
        self._measuring, sums, self._sums = False, self._sums, None
        world = self._trainer.args.world_size
        if world > 1:
            torch.distributed.reduce(sums, dst=0)
            sums /= world
        if self._log is not None:
            found, moments = self._window.add(step, sums[0], sums[1], self._rate)
            self._log.add(found, moments)
            self._unlogged.append(found)

    def save(self, checkpoint: Path | None) -> None:
        """Write what was measured so far, and into a checkpoint what a run that goes on from it needs."""
        if self._log is None:
            return
        if checkpoint is not None:
            saved.save_window(self._window, checkpoint / saved.STATE)
            with atomic(checkpoint / LOG) as temporary:
                shutil.copyfile(self._log.path, temporary)
        result = self.result
        if result.steps:
            result.save(self.folder)

    def end(self) -> None:
        """Write the results and leave the Trainer as it was."""
        self.save(None)
        if self._log is not None:
            print(f"llava_patch: gradient statistics of block {self.block} in {self.folder}", flush=True)
        self._undo.unwind()
        self._log = None

    # --- the run ------------------------------------------------------------------------------------------------------

    def _parameters(self) -> list[nn.Parameter]:
        return list(block_parameters(self._trainer.model, self.block).values())

    def _wrap_training_step(self) -> None:
        step = self._trainer.training_step

        @functools.wraps(step)
        def measure_and_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if self._measuring:
                self._measure(lambda bare: caught_loss(self._trainer, step, bare, copy.copy(inputs), *args, **kwargs))
            return step(model, inputs, *args, **kwargs)

        self._undo.set_attribute(self._trainer, "training_step", measure_and_step)

    def _measure(self, loss_of: Callable[[nn.Module], Tensor]) -> None:
        """One micro-batch of a measured step."""
        bare = self._trainer.model
        with unnoticed(bare):
            found = decompose(
                bare, lambda: loss_of(bare), self.block, self.settings.full, loss_scale(self._trainer), images=False
            )
        both = torch.stack(found)
        self._sums = both if self._sums is None else self._sums.add_(both)

    def _wrap_log(self) -> None:
        log = self._trainer.log

        @functools.wraps(log)
        def log_both(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs:
                logs = {**logs, **_means(self._unlogged)}
                self._unlogged = []
            log(logs, *args, **kwargs)

        self._undo.set_attribute(self._trainer, "log", log_both)

    def _go_on(self, step: int) -> bool:
        """Whether there was a measurement in the checkpoint that the run is resumed from, which goes on then."""
        folder = self._resumed
        if step == 0 or folder is None:
            return False
        if not (folder / saved.STATE).is_file() or not (folder / LOG).is_file():
            logger.warning(
                "Gradients: %s has no gradient statistics to go on with: they begin at step %d", folder, step + 1
            )
            return False
        device = self._parameters()[0].device
        self._window = saved.load_window(folder / saved.STATE, self.settings.window, device)
        # The checkpoint's log: the run's own may have grown since, or lie elsewhere.
        self._log = StepLog.resume(self.folder, self.settings, step, folder)
        return True

    def _warn(self, steps: int) -> None:
        chosen = self.settings
        measured = sum(map(chosen.measures, range(1, steps + 1)))
        if measured < chosen.window:
            logger.warning(
                "Gradients: %d of the run's %d steps are measured, but a window takes %d: there will be no variance, "
                "delta or condition (7); lower Gradients.window or Gradients.every (%d)",
                measured, steps, chosen.window, chosen.every,
            )  # fmt: skip
        if not any(p.requires_grad for p in self._parameters()):
            logger.warning(
                "Gradients: block %d of the vision tower does not train in this run (train_tower): what is measured is "
                "a gradient that no step applies",
                self.block,
            )

    def _facts(self) -> dict[str, Any]:
        handle = get_handle(self._trainer.model)
        assert handle is not None
        arguments = self._trainer.args
        micro = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        return {
            "learning_rate": arguments.learning_rate,
            "block": self.block,
            "fusion": repr(handle.fusion),
            "batch": micro * arguments.world_size,
            "checkpoint": str(getattr(handle.model.config, "_name_or_path", "")),
            "trains": True,
        }


def _means(steps: list[Step]) -> dict[str, float]:
    """What a line of the log says of the steps measured since the last one."""
    values = {
        "grad_main_norm": [math.sqrt(s.main) for s in steps if s.finite],
        "grad_skip_norm": [math.sqrt(s.skip) for s in steps if s.finite],
        "grad_cos": [s.cosine for s in steps if not math.isnan(s.cosine)],
    }
    return {name: float(f"{math.fsum(found) / len(found):.6g}") for name, found in values.items() if found}


def _callback(following: Following) -> Any:
    from transformers import TrainerCallback

    class GradientsCallback(TrainerCallback):
        """Tells the measurement where the run is."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            following.begin(state)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            following.begin_step(state.global_step + 1)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            following.end_step(state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            following.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            following.end()

    return GradientsCallback()
